"""config.json of a model folder ↔ the network's shape and the labels, as transformers writes and reads it."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from bertpair.errors import CheckpointError, ConfigError, half_character, list_faults, listed
from bertpair.model.bert import ACTIVATIONS, BertConfig
from bertpair.settings.files import read_json
from bertpair.settings.values import LABELS, convert

logger = logging.getLogger(__name__)

INTEGERS = {  # the lowest and highest that make sense; beyond lies a damaged file, not a larger BERT
    "vocab_size": (1, 10_000_000),
    "hidden_size": (1, 65_536),
    "num_hidden_layers": (1, 1_000),
    "num_attention_heads": (1, 65_536),
    "intermediate_size": (1, 1_000_000),
    "max_position_embeddings": (1, 1_000_000),
    "type_vocab_size": (1, 1_000_000),
}
MAX_LABELS = 1_000_000
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
NOT_WRITTEN = (  # would be untrue of what we write: float32, plain BERT, other data, labels told by id2label
    "_name_or_path",
    "auto_map",
    "bertpair",
    "num_labels",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
)
CLASSIFICATION, REGRESSION = "single_label_classification", "regression"


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """A model folder whose config.json was read and found sound; its weights are another matter."""

    path: Path
    config: BertConfig
    labels: tuple[str, ...] | None  # in id order; None: no names (none at all, LABEL_k, or a regression)
    regression: bool
    takes_pairs: bool | None  # None: the folder does not say
    header: tuple[str, ...] | None  # the training file's header row; None: it had none, or it is not known
    raw: dict[str, Any]  # config.json as it stands


def read_folder(path: Path, *, config_name: str | Path | None = None) -> ModelFolder:
    """Read config.json of `path`, or `config_name` instead: another folder, or a file.

    Raises CheckpointError listing every fault by file and field.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; expected a model folder with config.json in it")
    source = Path(config_name or path)
    file = source / "config.json" if source.is_dir() else source
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; a model folder holds one, and a vocabulary and weights")
    raw = read_json(file)
    faults = [*_family_faults(raw), *_field_faults(raw)]
    names, count, regression = _read_labels(raw, faults)
    takes_pairs, header = _read_layout(raw, faults)
    if faults:
        raise CheckpointError(list_faults([f"{file}: {fault}" for fault in faults]))
    fields = {field.name for field in dataclasses.fields(BertConfig)} - {"num_labels"}
    config = BertConfig(**{name: raw[name] for name in fields & set(raw)}, num_labels=count)
    return ModelFolder(path, config, names, regression, takes_pairs, header, raw)


def label_order(
    folder: ModelFolder, data_labels: Sequence[str], *, new_head: bool, given: bool = False
) -> tuple[str, ...]:
    """The labels in id order for training `folder` on data with `data_labels`.

    The folder's own order where its names are the same set; the data's where it has no names, and where a new
    head replaces another set or the order was `given` in the settings. Raises CheckpointError for another set
    otherwise.
    """
    same = folder.labels is not None and set(folder.labels) == set(data_labels)
    if folder.labels is None or (new_head and (given or not same)):
        return tuple(data_labels)
    if same:
        if given and folder.labels != tuple(data_labels):
            logger.warning(
                "labels: %s keeps the order that it was trained in, %s; new_head: true sets another",
                folder.path,
                listed(folder.labels),
            )
        return folder.labels
    raise CheckpointError(
        f"{folder.path}: its labels are {listed(folder.labels)}, the data's are {listed(data_labels)};"
        " `new_head: true` trains a new classifier for the data's"
    )


def check_pairs(folder: ModelFolder, advice: str = "") -> None:
    """CheckpointError where the network cannot tell the second text of a pair from the first.

    It ends with `advice`, which says what its reader can do.
    """
    if folder.config.type_vocab_size < 2:
        raise CheckpointError(
            f"{folder.path}: type_vocab_size is {folder.config.type_vocab_size}, and pairs need 2: "
            f"this model takes single texts only{advice}"
        )


def name_labels(folder: ModelFolder, given: Sequence[str] | None) -> tuple[str, ...] | None:
    """The label names in id order for using `folder`: its own, else those `given`, else LABEL_0, LABEL_1, …

    None for a regression. Raises ConfigError where `given` names another set, or another number of labels.
    """
    if given is not None:
        given = _sound_labels(given)
    if folder.regression:
        if given is not None:
            raise ConfigError(f"labels: found {listed(given)}; {folder.path} is a regression model")
        return None
    count = folder.config.num_labels
    unnamed = tuple(f"LABEL_{i}" for i in range(count))
    own = folder.labels or unnamed
    if given is None and folder.labels is None:
        logger.info("%s: its labels have no names; `labels` gives them, in id order", folder.path)
    if given is None or set(given) == set(own):
        return own
    if folder.labels is not None:
        raise ConfigError(
            f"labels: found {listed(given)}; {folder.path} was trained for {listed(folder.labels)}"
        )
    if len(given) != count:
        raise ConfigError(f"labels: found {len(given)} names; {folder.path} has {count} labels without names")
    return tuple(given)


def _sound_labels(given: Sequence[str]) -> tuple[str, ...]:
    try:
        return tuple(label.strip() for label in cast(list[str], convert(LABELS, given)))
    except ValueError as error:
        raise ConfigError(f"labels: {error}") from None


def config_json(
    config: BertConfig,
    labels: Sequence[str] | None,
    regression: bool,
    raw: Mapping[str, Any] | None = None,
    *,
    takes_pairs: bool,
    header: Sequence[str] | None,
) -> bytes:
    """config.json for weights as we write them; other keys of `raw`, the original's, stay.

    `takes_pairs` and `header`, the training file's, stand in one object that transformers ignores.
    """
    if labels is not None and (regression or len(labels) != config.num_labels):
        raise ValueError(f"{len(labels)} labels for a model of {config.num_labels} outputs ({regression=})")
    names = labels if labels is not None else [f"LABEL_{i}" for i in range(config.num_labels)]
    kept = {key: value for key, value in (raw or {}).items() if key not in NOT_WRITTEN}
    shape = dataclasses.asdict(config)
    del shape["num_labels"]
    document = {
        **kept,
        **shape,
        "architectures": ["BertForSequenceClassification"],
        "bertpair": {"takes_pairs": takes_pairs, "header": None if header is None else list(header)},
        "dtype": "float32",
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        "model_type": "bert",
        "problem_type": REGRESSION if regression else CLASSIFICATION,
    }
    return (json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode(
        errors="backslashreplace"  # a lone surrogate that somebody wrote as an escape stays one
    )


def _family_faults(raw: Mapping[str, Any]) -> list[str]:
    """What makes it no plain BERT encoder."""
    kind, classes = raw.get("model_type"), raw.get("architectures") or []
    if kind is None and "hidden_size" not in raw:
        return ["model_type: there is none, and no hidden_size either: this describes no BERT"]
    if kind is None and not (isinstance(classes, list) and all(str(n).startswith("Bert") for n in classes)):
        return [f"architectures: found {classes!r:.200}; expected a BERT"]
    if kind not in (None, "bert"):
        return [f"model_type: found {kind!r:.200}; only bert is supported"]
    faults = []
    if raw.get("position_embedding_type") not in (None, "absolute"):
        faults.append(
            f"position_embedding_type: found {raw['position_embedding_type']!r:.200}; expected absolute"
        )
    for switch in ("is_decoder", "add_cross_attention"):
        if raw.get(switch) not in (None, False):
            faults.append(f"{switch}: found {raw[switch]!r:.200}; only encoders are supported (false)")
    if raw.get("pruned_heads"):
        faults.append("pruned_heads: found some; only whole layers are supported")
    return faults


def _field_faults(raw: Mapping[str, Any]) -> list[str]:
    """Fields of the network's shape that are of a wrong type or out of range."""
    shape = {**dataclasses.asdict(BertConfig()), **raw}
    faults = [
        f"{name}: found {shape[name]!r:.200}; expected a whole number from {low} to {high}"
        for name, (low, high) in INTEGERS.items()
        if not _is_integer(shape[name], low, high)
    ]
    heads, size, words = shape["num_attention_heads"], shape["hidden_size"], shape["vocab_size"]
    if not faults and size % heads:
        faults.append(f"hidden_size: found {size}; expected a multiple of num_attention_heads ({heads})")
    if (
        not faults
        and shape["pad_token_id"] is not None
        and not _is_integer(shape["pad_token_id"], 0, words - 1)
    ):
        found = shape["pad_token_id"]
        faults.append(
            f"pad_token_id: found {found!r:.200}; expected a whole number under vocab_size ({words})"
        )
    for name in DROPOUTS:
        value = shape[name]
        if not (_is_number(value) and 0 <= value < 1) and not (
            value is None and name == "classifier_dropout"
        ):
            faults.append(f"{name}: found {value!r:.200}; expected a number from 0 to less than 1")
    for name in ("initializer_range", "layer_norm_eps"):
        if not (_is_number(shape[name]) and 0 < shape[name] <= 1):
            faults.append(f"{name}: found {shape[name]!r:.200}; expected a number over 0, at most 1")
    if not isinstance(shape["hidden_act"], str) or shape["hidden_act"] not in ACTIVATIONS:
        allowed = ", ".join(ACTIVATIONS)
        faults.append(f"hidden_act: found {shape['hidden_act']!r:.200}; expected one of {allowed}")
    return faults


def _read_labels(raw: Mapping[str, Any], faults: list[str]) -> tuple[tuple[str, ...] | None, int, bool]:
    """Label names in id order (None: no names), the number of outputs, regression? Adds to `faults`."""
    by_id = _names_by_id(raw.get("id2label"), faults)
    by_name = _names_by_name(raw.get("label2id"), faults)
    names = by_id if _has_names(by_id) else by_name if _has_names(by_name) else None
    if names is not None and _has_names(by_name) and names != by_name:
        faults.append("label2id: contradicts id2label")
    stated = raw.get("num_labels")
    if stated is not None and not _is_integer(stated, 1, MAX_LABELS):
        faults.append(f"num_labels: found {stated!r:.200}; expected a whole number from 1 to {MAX_LABELS}")
        stated = None
    problem = raw.get("problem_type")
    if problem not in (None, CLASSIFICATION, REGRESSION):
        faults.append(f"problem_type: found {problem!r:.200}; expected {CLASSIFICATION} or {REGRESSION}")
    if names is not None and stated is not None and stated != len(names):
        faults.append(f"num_labels: found {stated}, but {len(names)} labels are named")
    # Tables of LABEL_k say nothing: old transformers wrote two of them beside any num_labels.
    tables = [len(table) for table in (names, by_id, by_name) if table]
    count = stated or next(iter(tables), 1 if problem == REGRESSION else BertConfig.num_labels)
    regression = problem == REGRESSION or (problem is None and count == 1)
    if regression != (count == 1):
        faults.append(f"problem_type: found {problem} with {count} labels; one label means {REGRESSION}")
    return None if regression else names, count, regression


def _read_layout(raw: Mapping[str, Any], faults: list[str]) -> tuple[bool | None, tuple[str, ...] | None]:
    """Whether the model takes pairs, and the training file's header. Adds to `faults`."""
    layout = raw.get("bertpair")
    if layout is None:
        return None, None
    takes_pairs = layout.get("takes_pairs") if isinstance(layout, dict) else None
    header = layout.get("header") if isinstance(layout, dict) else None
    is_header = header is None or (
        isinstance(header, list) and header != [] and all(isinstance(name, str) for name in header)
    )
    if not isinstance(takes_pairs, bool) or not is_header:
        faults.append(
            f"bertpair: found {layout!r:.200}; "
            "expected takes_pairs (true or false) and header (names or null)"
        )
        return None, None
    return takes_pairs, None if header is None else tuple(header)


def _names_by_id(table: Any, faults: list[str]) -> tuple[str, ...]:
    if table is None:
        return ()
    ids = [str(i) for i in range(len(table))] if isinstance(table, dict) else []
    if not ids or set(ids) != set(table) or len(ids) > MAX_LABELS:
        faults.append(
            f"id2label: found {table!r:.200}; expected names under the keys 0, 1, 2, … without a gap"
        )
        return ()
    names = tuple(table[i] for i in ids)
    if not all(map(_is_name, names)) or len(set(names)) < len(names):
        faults.append(f"id2label: found {table!r:.200}; expected names, none empty and none twice")
        return ()
    return names


def _names_by_name(table: Any, faults: list[str]) -> tuple[str, ...]:
    if table is None:
        return ()
    if (
        not isinstance(table, dict)
        or not all(map(_is_name, table))
        or not all(_is_integer(i, 0, MAX_LABELS) for i in table.values())
        or sorted(table.values()) != list(range(len(table)))
        or not table
    ):
        faults.append(f"label2id: found {table!r:.200}; expected names with the ids 0, 1, 2, … without a gap")
        return ()
    return tuple(sorted(table, key=lambda name: int(table[name])))


def _has_names(names: Sequence[str]) -> bool:
    return any(name != f"LABEL_{i}" for i, name in enumerate(names))


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value != "" and half_character(value) is None


def _is_integer(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
