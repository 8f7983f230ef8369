"""config.json of a model folder ↔ the network's shape and the labels, as transformers writes and reads it."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, PlainValidator

from bertpair.errors import CheckpointError, ConfigError, half_character, list_faults, listed
from bertpair.model.bert import BertConfig
from bertpair.settings.config import DataSettings
from bertpair.settings.fields import Group, Switch, Whole, said, typed
from bertpair.settings.files import read_json

logger = logging.getLogger(__name__)

# They would be untrue of what we write: float32, plain BERT, other data, labels told by id2label.
NOT_WRITTEN = {"_name_or_path", "auto_map", "bertpair", "num_labels", "quantization_config", "torch_dtype"}
NOT_WRITTEN |= {"transformers_version"}
CLASSIFICATION, REGRESSION = "single_label_classification", "regression"


def _names(table: object) -> tuple[str, ...]:
    """The label names of an id2label or a label2id, in id order."""
    by_id = table if isinstance(table, dict) else {}
    size = len(by_id)
    if all(type(i) is int for i in by_id.values()):
        by_id = {str(i): name for name, i in by_id.items()}
    names = tuple(by_id.get(str(i)) for i in range(size))
    sound = [name for name in names if isinstance(name, str) and name and half_character(name) is None]
    if not names or len(set(sound)) < size:
        raise ValueError
    return tuple(sound)


_Names = Annotated[
    tuple[str, ...],
    PlainValidator(lambda table: () if table is None else _names(table)),
    said("names, none empty and none twice, with the ids 0, 1, 2, … without a gap"),
]
_Empty = Annotated[dict[str, Any] | list[Any], Field(max_length=0)]
_Nothing = Annotated[_Empty | None, said("none: only whole layers are supported")]
_Encoder = Annotated[Literal[False] | None, said("false: only encoders are supported")]


class _Layout(Group):
    """What config.json says in an object of ours, which transformers ignores."""

    takes_pairs: Switch
    header: Annotated[tuple[str, ...], Field(min_length=1)] | None = None  # the training file's


class _ConfigJson(BertConfig):
    """What is read of config.json: the shape of the network, its labels, and what must not be asked."""

    model_config = ConfigDict(extra="ignore")

    model_type: Annotated[Literal["bert"] | None, said("bert, the only type for now")] = None
    architectures: Annotated[list[str] | None, said("names of BERT classes")] = None
    position_embedding_type: Literal["absolute"] | None = None
    is_decoder: _Encoder = None
    add_cross_attention: _Encoder = None
    pruned_heads: _Nothing = None
    problem_type: Literal["single_label_classification", "regression"] | None = None
    num_labels: Whole | None = Field(None, ge=1, le=1_000_000)  # type: ignore[assignment]
    id2label: _Names = ()
    label2id: _Names = ()
    bertpair: Annotated[_Layout | None, said("takes_pairs (true or false) and header (names or null)")] = None


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
    values, wrong = typed(_ConfigJson, raw)
    said = _ConfigJson.model_construct(**values)  # those are sound; the others have their defaults
    faults = [f"{name}: {fault}" for name, fault in wrong.items()]
    width, heads = said.hidden_size, said.num_attention_heads
    words, padding = said.vocab_size, said.pad_token_id
    is_bert = "hidden_size" in values and all(name.startswith("Bert") for name in said.architectures or ())
    if said.model_type is None and "model_type" not in wrong and not is_bert:
        faults.append("model_type: expected bert, found none, and this describes no BERT")
    if not {"hidden_size", "num_attention_heads"} & wrong.keys() and width % heads:
        faults.append(f"hidden_size: expected a multiple of num_attention_heads ({heads}), found {width}")
    if "vocab_size" not in wrong and (padding or 0) >= words:
        faults.append(f"pad_token_id: expected a whole number under vocab_size ({words}), found {padding}")
    names, count, regression = _read_labels(said, faults)
    if faults:
        raise CheckpointError(list_faults([f"{file}: {fault}" for fault in faults]))
    shape = {name: values[name] for name in BertConfig.model_fields if name in values}
    config, layout = BertConfig(**shape | {"num_labels": count}), said.bertpair
    pairs, header = (layout.takes_pairs, layout.header) if layout else (None, None)
    return ModelFolder(path, config, names, regression, pairs, header, raw)


def _read_labels(said: _ConfigJson, faults: list[str]) -> tuple[tuple[str, ...] | None, int, bool]:
    """Label names in id order (None: no names), the number of outputs, regression? Adds to `faults`."""
    # Tables of LABEL_k say nothing: old transformers wrote two of them beside any num_labels.
    tables = [table for table in (said.id2label, said.label2id) if table]
    named = [table for table in tables if any(name != f"LABEL_{i}" for i, name in enumerate(table))]
    names = named[0] if named else None
    if named and named[-1] != names:
        faults.append("label2id: contradicts id2label")
    stated, problem = said.num_labels, said.problem_type
    if names is not None and stated is not None and stated != len(names):
        faults.append(f"num_labels: found {stated}, but {len(names)} labels are named")
    counts = [len(table) for table in (names, *tables) if table]
    count = stated or next(iter(counts), 1 if problem == REGRESSION else BertConfig().num_labels)
    regression = problem == REGRESSION or (problem is None and count == 1)
    if regression != (count == 1):
        faults.append(f"problem_type: found {problem} with {count} labels; one label means {REGRESSION}")
    return None if regression else names, count, regression


def label_order(
    folder: ModelFolder, data_labels: Sequence[str], *, new_head: bool, given: bool = False
) -> tuple[str, ...]:
    """The labels in id order for training `folder` on data with `data_labels`: the folder's own order where
    its names are the same set; the data's where it has no names, and where a new head replaces another set
    or the order was `given` in the settings. Raises CheckpointError for another set otherwise."""
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
    """CheckpointError, with `advice` at its end, where the network cannot tell two texts apart."""
    if (types := folder.config.type_vocab_size) < 2:
        need = f"type_vocab_size is {types}, and pairs need 2: this model takes single texts only"
        raise CheckpointError(f"{folder.path}: {need}{advice}")


def name_labels(folder: ModelFolder, given: Sequence[str] | None) -> tuple[str, ...] | None:
    """The label names in id order for using `folder`: its own, else those `given`, else LABEL_0, LABEL_1, …

    None for a regression. Raises ConfigError where `given` names another set, or another number of labels.
    """
    path, count, known = folder.path, folder.config.num_labels, folder.labels
    if given is not None:
        given = tuple(label.strip() for label in DataSettings(labels=given).labels or ())
        if folder.regression:
            raise ConfigError(f"labels: found {listed(given)}; {path} is a regression model")
    elif known is None and not folder.regression:
        logger.info("%s: its labels have no names; `labels` gives them, in id order", path)
    own = None if folder.regression else known or tuple(f"LABEL_{i}" for i in range(count))
    if given is None or own is None or set(given) == set(own):
        return own
    if known is not None:
        raise ConfigError(f"labels: found {listed(given)}; {path} was trained for {listed(known)}")
    if len(given) != count:
        raise ConfigError(f"labels: found {len(given)} names; {path} has {count} labels without names")
    return given


def config_json(
    config: BertConfig,
    labels: Sequence[str] | None,
    raw: Mapping[str, Any] | None = None,
    *,
    takes_pairs: bool,
    header: Sequence[str] | None,
) -> bytes:
    """config.json for weights as we write them; `labels` None: a regression. Other keys of `raw` stay.

    `takes_pairs` and `header`, the training file's, stand in one object that transformers ignores.
    """
    names = labels or ["LABEL_0"]
    document = {
        **{key: value for key, value in (raw or {}).items() if key not in NOT_WRITTEN},
        **config.model_dump(exclude={"num_labels"}),
        "architectures": ["BertForSequenceClassification"],
        "bertpair": {"takes_pairs": takes_pairs, "header": header},
        "dtype": "float32",
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        "model_type": "bert",
        "problem_type": REGRESSION if labels is None else CLASSIFICATION,
    }
    text = json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace")  # a lone surrogate written as an escape stays one
