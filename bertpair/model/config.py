"""config.json of a model folder ↔ the network's shape and the labels, as transformers writes and reads it."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator

from bertpair.errors import CheckpointError, ConfigError, half_character, list_faults, listed, show
from bertpair.model.bert import BertConfig
from bertpair.model.families import FAMILIES
from bertpair.model.family import BERT, Family
from bertpair.model.pooling import Pooling
from bertpair.settings.data import DataSettings
from bertpair.settings.fields import Group, Switch, Whole, said, typed
from bertpair.settings.files import read_json

logger = logging.getLogger(__name__)

# They would be untrue of what we write: float32, our own code, other data, labels told by id2label.
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


def _not_quantised(config: object) -> None:
    """A ValueError where weights are not numbers of a float type."""
    if config:
        method = config.get("quant_method") if isinstance(config, dict) else None
        by = f" by {show(method)}" if method else ""
        raise ValueError(f"found weights quantised{by}; only the original ones are supported")


class _Layout(BaseModel, frozen=True):
    """What config.json says in an object of ours, which transformers ignores."""

    takes_pairs: Switch
    header: Annotated[tuple[str, ...], Field(min_length=1)] | None = None  # the training file's
    pooling: Pooling | None = None  # where transformers knows no such model


class _ConfigJson(Group):
    """What is read of any config.json beside the shape of the network: its labels, and what must not be."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    model_type: Annotated[str | None, said("the name of a kind of network")] = None
    architectures: Annotated[list[str] | None, said("names of classes")] = None
    position_embedding_type: Literal["absolute"] | None = None
    is_decoder: _Encoder = None
    add_cross_attention: _Encoder = None
    pruned_heads: _Nothing = None
    quantization_config: Annotated[None, PlainValidator(_not_quantised), said("none")] = None
    problem_type: Literal["single_label_classification", "regression"] | None = None
    num_labels: Whole | None = Field(None, ge=1, le=1_000_000)
    id2label: _Names = ()
    label2id: _Names = ()
    bertpair: Annotated[_Layout | None, said("what bertpair writes there: takes_pairs, header, pooling")] = (
        None
    )


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """A model folder whose config.json was read and found sound; its weights are another matter."""

    path: Path
    config: BertConfig
    family: Family
    labels: tuple[str, ...] | None  # in id order; None: no names (none at all, LABEL_k, or a regression)
    regression: bool
    takes_pairs: bool | None  # None: the folder does not say
    header: tuple[str, ...] | None  # the training file's header row; None: it had none, or it is not known
    raw: dict[str, Any]  # config.json as it stands

    @property
    def max_length(self) -> int:
        """Tokens of the longest row that the network has positions for."""
        return self.family.max_length(self.config)

    @property
    def can_take_pairs(self) -> bool:
        return not self.family.pairs_need_types or self.config.type_vocab_size > 1


def read_folder(path: Path, *, config_name: str | Path | None = None) -> ModelFolder:
    """Read config.json of `path`, or `config_name` instead: another folder, or a file.

    Raises CheckpointError listing every fault by file and field.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; expected a model folder with config.json in it")
    source = Path(config_name or path)
    file = source / "config.json" if source.is_dir() else source
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; {_instead_of_config(file.parent)}")
    raw = read_json(file)
    values, wrong = typed(_ConfigJson, raw)
    said = _ConfigJson.model_construct(**values)  # those are sound; the others have their defaults
    family = _family(said, raw, file)
    config, faults = _read_shape(family, raw, wrong)
    names, count, regression = _read_labels(said, faults)
    if faults:
        raise CheckpointError(list_faults([f"{file}: {fault}" for fault in faults]))
    layout = said.bertpair
    pairs, header = (layout.takes_pairs, layout.header) if layout else (None, None)
    pooling = (layout and layout.pooling) or config.pooling
    config = config.model_copy(update={"num_labels": count, "pooling": pooling})
    return ModelFolder(path, config, family, names, regression, pairs, header, raw)


def _read_shape(
    family: Family, raw: Mapping[str, Any], wrong: Mapping[str, str]
) -> tuple[BertConfig, list[str]]:
    """The network's shape, as far as it is sound, and the faults of all fields, those of `wrong` included."""
    fields = {name: each.alias or name for name, each in family.config.model_fields.items()}
    unread = {fields[name] for name, each in family.config.model_fields.items() if each.exclude}
    read = {*fields.values()} - unread - {"num_labels"}
    shape, misshapen = typed(family.config, {key: raw[key] for key in raw if key in read})
    wrong = {key: fault for key, fault in wrong.items() if key not in family.unchecked} | misshapen
    faults, config = [f"{name}: {wrong[name]}" for name in raw if name in wrong], family.config(**shape)
    width, heads, padding = config.hidden_size, config.num_attention_heads, config.pad_token_id or 0
    sizes = fields["hidden_size"], fields["num_attention_heads"]
    if not {*sizes} & wrong.keys() and width % heads:
        faults.append(f"{sizes[0]}: expected a multiple of {sizes[1]} ({heads}), found {width}")
    if "vocab_size" not in wrong and padding >= config.vocab_size:
        under = f"expected a whole number under vocab_size ({config.vocab_size})"
        faults.append(f"pad_token_id: {under}, found {padding}")
    return config, [*faults, *(() if misshapen else family.faults(config))]


def _family(said: _ConfigJson, raw: Mapping[str, Any], file: Path) -> Family:
    """What model_type names; without one, a BERT where the fields and the classes are BERT's."""
    kinds = f"supported are {', '.join(FAMILIES)}"
    if raw.get("model_type") is None:
        is_bert = all(name.startswith("Bert") for name in said.architectures or ())
        if "hidden_size" in raw and is_bert and isinstance(raw.get("architectures"), list | None):
            return BERT
        raise CheckpointError(f"{file}: model_type: found none, and this describes no BERT; {kinds}")
    if said.model_type in FAMILIES:
        return FAMILIES[said.model_type]
    kind = ""
    if raw.get("is_encoder_decoder") is True:
        kind = ", an encoder-decoder"
    elif any(name.endswith("ForCausalLM") or "GPT" in name for name in said.architectures or ()):
        kind = ", a decoder"
    raise CheckpointError(f"{file}: model_type: found {show(raw['model_type'])}{kind}; {kinds}, all encoders")


def _instead_of_config(folder: Path) -> str:
    """What a folder without config.json is, as far as its other files tell."""
    if (folder / "adapter_config.json").is_file():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        merge = "peft's merge_and_unload() and save_pretrained() merge them into one model folder"
        return f"these are LoRA adapters alone, of the base model {show(base)}: {merge}"
    inner = sorted(each.parent.name for each in folder.glob("*/config.json"))
    if (folder / "modules.json").is_file() and inner:
        return f"this is a sentence-transformers folder: name its sub-folder {folder / inner[0]}"
    return "a model folder holds one, and a vocabulary and weights"


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
    count = stated or next(iter(counts), 1 if problem == REGRESSION else 2)
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


def check_model_type(folder: ModelFolder, given: str | None) -> None:
    """ConfigError where `given` names another kind of network; case, - and _ do not count."""
    own = folder.raw.get("model_type") or "bert"
    spelt = [re.sub("[-_ ]", "", name).lower() for name in (given or own, own)]
    if spelt[0] != spelt[1]:
        raise ConfigError(f"model_type: found {given}; {folder.path} is a {own} model")


def check_pairs(folder: ModelFolder, advice: str = "") -> None:
    """CheckpointError, with `advice` at its end, where the network cannot tell two texts apart."""
    if not folder.can_take_pairs:
        need = "type_vocab_size is 1, and pairs need 2: this model takes single texts only"
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

    `takes_pairs` and `header`, the training file's, stand in one object that transformers ignores, and so
    does a pooling that it has no model for.
    """
    names = labels or ["LABEL_0"]
    model_type = (raw or {}).get("model_type") or "bert"
    family = FAMILIES[model_type]
    layout: dict[str, Any] = {"takes_pairs": takes_pairs, "header": header}
    if config.pooling not in family.poolings:
        config, layout = config.model_copy(update={"pooling": "cls"}), layout | {"pooling": config.pooling}
    document = {
        **{key: value for key, value in (raw or {}).items() if key not in NOT_WRITTEN},
        **config.model_dump(exclude={"num_labels"}, by_alias=True),
        "architectures": [family.architecture],
        "bertpair": layout,
        "dtype": "float32",
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        "model_type": model_type,
        "problem_type": REGRESSION if labels is None else CLASSIFICATION,
    }
    text = json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace")  # a lone surrogate written as an escape stays one
