"""config.json of a model folder ↔ the network's shape and the labels, as transformers writes and reads it."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from bertpair.errors import CheckpointError, ConfigError, half_character, list_faults, listed, show
from bertpair.model.bert import BertConfig
from bertpair.settings.files import read_json
from bertpair.settings.values import LABELS, Kind, convert

logger = logging.getLogger(__name__)

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


def _only(expected: str, *values: object) -> Kind:
    def accept(value: object) -> object:
        if value is not None and value not in values:
            raise ValueError
        return value

    return Kind(expected, accept)


KINDS = {
    "position_embedding_type": _only("absolute", "absolute"),
    "is_decoder": _only("false: only encoders are supported", False),
    "add_cross_attention": _only("false: only encoders are supported", False),
    "pruned_heads": _only("none: only whole layers are supported", {}, []),
    **{field.name: field.metadata["kind"] for field in dataclasses.fields(BertConfig)},
    "problem_type": _only(f"{CLASSIFICATION} or {REGRESSION}", CLASSIFICATION, REGRESSION),
}


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
    wrong = _wrong_fields(raw)
    faults = [f"{name}: {fault}" for name, fault in wrong.items()]
    sound = {name: value for name, value in raw.items() if name not in wrong}
    names, count, regression = _read_labels(sound, faults)
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
    own, found = folder.labels, tuple(data_labels)
    if own is None or (new_head and (given or set(own) != set(found))):
        return found
    if set(own) != set(found):
        raise CheckpointError(
            f"{folder.path}: its labels are {listed(own)}, the data's are {listed(found)};"
            " `new_head: true` trains a new classifier for the data's"
        )
    if given and own != found:
        said = "labels: %s keeps the order that it was trained in, %s; new_head: true sets another"
        logger.warning(said, folder.path, listed(own))
    return own


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
        try:
            given = [label.strip() for label in cast(list[str], convert(LABELS, given))]
        except ValueError as error:
            raise ConfigError(f"labels: {error}") from None
    if folder.regression:
        if given is not None:
            raise ConfigError(f"labels: found {listed(given)}; {folder.path} is a regression model")
        return None
    count = folder.config.num_labels
    own = folder.labels or tuple(f"LABEL_{i}" for i in range(count))
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


def _wrong_fields(raw: Mapping[str, Any]) -> dict[str, str]:
    """Fields that are missing, of a wrong type or out of range, and what is wrong with each."""
    shape = {**dataclasses.asdict(BertConfig()), "num_labels": None, **raw}
    faults = {}
    kind, classes = raw.get("model_type"), raw.get("architectures") or []
    if kind is None and "hidden_size" in raw:
        if not isinstance(classes, list) or not all(str(name).startswith("Bert") for name in classes):
            faults["architectures"] = f"found {classes!r:.200}; expected a BERT"
    elif kind != "bert":
        faults["model_type"] = f"found {show(kind)}; only bert is supported, and this describes no BERT"
    for name, kind in KINDS.items():
        if not _is_sound(kind, shape.get(name)):
            faults[name] = f"found {show(shape.get(name))}; expected {kind.expected}"
    heads, words, pad = shape["num_attention_heads"], shape["vocab_size"], shape["pad_token_id"]
    if not faults.keys() & {"num_attention_heads", "hidden_size"} and shape["hidden_size"] % heads:
        expected = f"a multiple of num_attention_heads ({heads})"
        faults["hidden_size"] = f"found {shape['hidden_size']}; expected {expected}"
    if not faults.keys() & {"vocab_size", "pad_token_id"} and pad is not None and pad >= words:
        faults["pad_token_id"] = f"found {pad}; expected a whole number under vocab_size ({words})"
    return faults


def _is_sound(kind: Kind, value: object) -> bool:
    try:
        return kind.accept(value) == value  # a quoted number is text here, as it is to transformers
    except ValueError:
        return False


def _read_labels(raw: Mapping[str, Any], faults: list[str]) -> tuple[tuple[str, ...] | None, int, bool]:
    """Label names in id order (None: no names), the number of outputs, regression? Adds to `faults`."""
    by_id, by_name = (_read_names(raw, key, faults) for key in ("id2label", "label2id"))
    # Tables of LABEL_k say nothing: old transformers wrote two of them beside any num_labels.
    named = [table for table in (by_id, by_name) if any(name != f"LABEL_{i}" for i, name in enumerate(table))]
    names = named[0] if named else None
    if named and named[-1] != names:
        faults.append("label2id: contradicts id2label")
    stated, problem = raw.get("num_labels"), raw.get("problem_type")
    if names is not None and stated is not None and stated != len(names):
        faults.append(f"num_labels: found {stated}, but {len(names)} labels are named")
    tables = [len(table) for table in (names, by_id, by_name) if table]
    count = stated or next(iter(tables), 1 if problem == REGRESSION else BertConfig.num_labels)
    regression = problem == REGRESSION or (problem is None and count == 1)
    if regression != (count == 1):
        faults.append(f"problem_type: found {problem} with {count} labels; one label means {REGRESSION}")
    return None if regression else names, count, regression


def _read_names(raw: Mapping[str, Any], key: str, faults: list[str]) -> tuple[str, ...]:
    """The names of id2label or label2id in id order, () where there are none. Adds to `faults`."""
    table = raw.get(key)
    if table is None:
        return ()
    by_id = table if isinstance(table, dict) else {}
    if key == "label2id":
        by_id = {str(i): name for name, i in by_id.items() if type(i) is int}
    names = [by_id.get(str(i)) for i in range(len(table))] if by_id else []
    is_sound = all(isinstance(name, str) and name and half_character(name) is None for name in names)
    if not names or not is_sound or len(set(names)) < len(names):
        faults.append(
            f"{key}: found {table!r:.200}; expected names, none empty and none twice, "
            "with the ids 0, 1, 2, … without a gap"
        )
        return ()
    return tuple(map(str, names))


def _read_layout(raw: Mapping[str, Any], faults: list[str]) -> tuple[bool | None, tuple[str, ...] | None]:
    """Whether the model takes pairs, and the training file's header. Adds to `faults`."""
    layout = raw.get("bertpair")
    if layout is None:
        return None, None
    said = layout if isinstance(layout, dict) else {}
    takes_pairs, header = said.get("takes_pairs"), said.get("header")
    is_header = isinstance(header, list) and header and all(isinstance(name, str) for name in header)
    if isinstance(takes_pairs, bool) and (header is None or is_header):
        return takes_pairs, tuple(header) if header else None
    faults.append(
        f"bertpair: found {layout!r:.200}; expected takes_pairs (true or false) and header (names or null)"
    )
    return None, None
