"""What a field of settings may hold: types, the words for them, and all faults of a group at once.

Types are strict, since YAML has types: a quoted number is text. But every float may be text, because PyYAML
reads 2e-5 as a string.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError
from pydantic import WithJsonSchema as JsonSchema

from bertpair.errors import ConfigError, half_character, list_faults, near_misses, plain, show

NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_WHOLE = re.compile(r"[-+]?[0-9]{1,18}")
_MANY = 2**31 - 1
_QUOTE_IT = "YAML reads an unquoted yes, no, on, off, true, null or number as something else: quote it"
_GPU = "the GPU is chosen by device: cuda, or cuda:1 for the second"
_NO_CACHE = "no longer means anything (texts are tokenized anew each time, which takes seconds)"
RETIRED = {"token_cache_dir": _NO_CACHE, "overwrite_cache": _NO_CACHE}  # older folders have them
# What people call a setting: its name here, or a sentence about it.
OTHER_NAMES = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "max_length": "max_seq_length",
    "validation_file": "dev_file",
    "model": "model_name_or_path",
    "seeds": "several seeds are asked for by a flag of train.py: --seeds 5",
    "bf16": "mixed precision is set by amp: bf16",
    "gpu": _GPU,
    "cuda": _GPU,
    **RETIRED,
    "gradient_checkpointing": "there is none; a smaller per_device_train_batch_size with more "
    "gradient_accumulation_steps saves memory too",
}


class FieldError(ConfigError):
    """Values that a group of settings refuses: the fault of each, by its name."""

    def __init__(self, faults: Mapping[str, str]) -> None:
        super().__init__(list_faults(placed(faults, {name: name for name in faults})))
        self.faults = faults


def placed(faults: Mapping[str, str], where: Mapping[str, str]) -> list[str]:
    """Each fault after its place, such as `config.yaml:3: seed`; an unknown name stands in its fault."""
    return [
        where[name].removesuffix(name) + fault if fault.startswith("unknown") else f"{where[name]}: {fault}"
        for name, fault in faults.items()
    ]


class Group(BaseModel):
    """Settings that belong together: typed when made, never changed. FieldError lists all faults."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    if not TYPE_CHECKING:

        def __init__(self, /, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise FieldError(_explain(type(self), values, error)) from None


def setting(default: object, help: str, **facts: Any) -> Any:
    """A field with its default, its meaning in sentences, bounds, and `resume` and `owner` (see `Config`).

    Where the default is null, `help` may end with `Not given: …`. `example` is what may follow the flag,
    empty for a switch alone. A whole number from `ge` on is below 2**31 if nothing else is said; lower
    bounds of others are floats.
    """
    if isinstance(facts.get("ge"), int) and not {"le", "lt"} & facts.keys():
        facts["le"] = _MANY
    own: dict[str, Any] = {name: facts.pop(name) for name in ("resume", "owner", "example") if name in facts}
    return Field(default, description=help, json_schema_extra=own, **facts)


def typed(model: type[Group], raw: Mapping[str, object]) -> tuple[dict[str, Any], dict[str, str]]:
    """Typed values of the sound ones in `raw`, and the fault of each of the others, in its order."""
    try:
        made = model(**raw)
    except FieldError as error:
        sound, _ = typed(model, {name: value for name, value in raw.items() if name not in error.faults})
        return sound, {name: error.faults[name] for name in raw if name in error.faults}
    fields = {field.alias or name: name for name, field in model.model_fields.items()}
    return {name: getattr(made, fields[name]) for name in raw if name in fields}, {}


def _explain(model: type[Group], values: Mapping[str, object], error: ValidationError) -> dict[str, str]:
    faults: dict[str, str] = {}
    for item in error.errors(include_url=False):
        name = str(item["loc"][0])
        if item["type"] == "extra_forbidden" and len(item["loc"]) == 1:
            faults[name] = f"unknown setting {plain(name)}{suggest(name, model.model_fields)}"
        elif said := str(item.get("ctx", {}).get("error", "")):
            faults[name] = said
        else:
            faults.setdefault(name, f"expected {expected(model)[name]}, found {show(values[name])}")
    return faults


def suggest(name: str, known: Iterable[str]) -> str:
    """`; did you mean …?`, a sentence about what people call so, or nothing."""
    known = list(known)
    other = OTHER_NAMES.get(name.strip("-").replace("-", "_").lower(), "")
    if " " in other:
        return f": {other}"
    near = [other] if other in known else near_misses(name, known)
    return f"; did you mean {' or '.join(near)}?" if near else ""


@cache
def expected(model: type[Group]) -> dict[str, str]:
    """What each field may hold, in words."""
    return {name: _words(item) for name, item in model.model_json_schema()["properties"].items()}


@cache
def described(model: type[Group]) -> dict[str, str]:
    """Each field in sentences: what it means, what it may hold, and its default or what its absence means."""
    texts = {}
    for name, words in expected(model).items():
        field = model.model_fields[name]
        meaning, absent = str(field.description), f"Default: {as_word(field.default)}."
        if field.default is None:
            meaning, _, absent = meaning.partition(" Not given")
            absent, words = absent and f"Not given{absent}", words.removesuffix(", or null")
        is_noun = words.startswith(("a ", "one ", "the ", "true "))
        words = f"{words[0].upper()}{words[1:]}." if is_noun else f"Allowed: {words}."
        texts[name] = f"{meaning} {words} {absent}".rstrip()
    return texts


def as_word(value: object) -> str:
    """A value as it would be typed, a number to six digits."""
    if isinstance(value, Mapping):
        return " ".join(f"{key}={as_word(each)}" for key, each in value.items())
    if isinstance(value, list):
        return " ".join(map(as_word, value))
    if isinstance(value, float):
        return f"{value:g}".replace("e-0", "e-")
    if isinstance(value, str):
        return value if value.strip() else f'"{value}"'
    return show(value)


def _words(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        return ", or ".join(map(_words, schema["anyOf"]))
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    if "const" in schema:
        return show(schema["const"]).strip("'")
    names = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "null": "null"}
    name = str(schema.get("format") or names.get(schema.get("type", ""), "a value"))
    high, bounds = schema.get("maximum", _MANY), {"exclusiveMinimum": "above", "minimum": "of at least"}
    if schema.get("type") == "integer" and high != _MANY:
        return f"{name} from {schema['minimum']} to {high}"
    if high != _MANY or "exclusiveMaximum" in schema:
        bounds |= {"maximum": "at most", "exclusiveMaximum": "below"}
    bounded = [f"{bounds[key]} {schema[key]:.7g}" for key in bounds if key in schema]
    return f"{name} {' and '.join(bounded)}".strip()


def from_words(words: Sequence[str], annotation: Any) -> object:
    """The words after a flag as YAML would give the value; ValueError says what was found if it is none."""
    types = _plain_types(annotation)
    if types & {list, dict} and words and not (int in types and len(words) == 1):
        return None if list(words) == ["null"] and type(None) in types else [_whole(w, types) for w in words]
    if not words and bool in types:
        return True
    if len(words) != 1 and Any not in types:
        raise ValueError(f"{len(words)} words, {show(' '.join(words))}" if words else "nothing")
    word = " ".join(words)
    if bool in types and word.lower() in ("true", "false"):
        return word.lower() == "true"
    return None if word == "null" else _whole(word, types)


def _whole(word: str, types: set[Any]) -> int | str:
    return int(word) if int in types and _WHOLE.fullmatch(word) else word


def _plain_types(annotation: Any) -> set[Any]:
    """The types that an annotation allows, without what it asks of them."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return set(map(type, parts))
    if origin in (Annotated, Union, UnionType):
        return set().union(*map(_plain_types, parts[:1] if origin is Annotated else parts))
    if origin is list:  # numbers in a list are numbers too
        return {list} | set().union(*map(_plain_types, parts)) & {int}
    return {origin or annotation}


def as_text(value: object) -> str:
    """Text that can be written to YAML and handed to the system; ValueError otherwise."""
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str) or not text:
        raise ValueError
    if "\0" in text or half_character(text) is not None:
        raise ValueError(f"expected text without NUL or bytes that are not UTF-8, found {show(text)}")
    return text


def as_path(value: object) -> str:
    """The same for a path; `~` is the home folder."""
    text = as_text(value)
    if text.isspace():
        raise ValueError(f"expected a path, found {show(text)}")
    return os.path.expanduser(text)


def as_number(value: object) -> object:
    """A number that PyYAML or a command line left as text; anything else as it is."""
    return float(value) if isinstance(value, str) and NUMBER.fullmatch(value) else value


def as_label(value: object) -> str:
    """A label as text; a plain whole number is one too, anything else that YAML made of it is refused."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:d}"
    if not isinstance(value, str):
        raise ValueError(f"expected labels that are text, found {show(value)}; {_QUOTE_IT}")
    if not value.strip():
        raise ValueError("expected labels that are not empty, found an empty one")
    return as_text(value)


def _as_labels(value: object, least: int = 2) -> list[str]:
    if not isinstance(value, list | tuple):
        raise ValueError
    labels = [as_label(item) for item in value]
    if len(labels) < least:
        raise ValueError(f"expected at least two labels, found {', '.join(map(show, labels)) or 'none'}")
    if twice := [show(label) for label, count in Counter(labels).items() if count > 1]:
        raise ValueError(f"expected every label once, found {', '.join(twice[:5])} more than once")
    return labels


def _as_weights(value: object) -> object:
    if value in ("balanced", ["balanced"]):
        return "balanced"
    if isinstance(value, list) and all("=" in str(item)[1:] for item in value):  # from a command line
        value = {label: weight for label, _, weight in (str(item).rpartition("=") for item in value)}
    if not isinstance(value, Mapping) or not value:
        raise ValueError
    weights = dict(zip(_as_labels(list(value), least=1), map(as_number, value.values()), strict=True))
    for weight in weights.values():  # float32 holds a sum of losses so weighted
        if not isinstance(weight, int | float) or isinstance(weight, bool) or not 1e-6 <= weight <= 1e6:
            raise ValueError(f"expected weights of at least 1e-06 and at most 1e+06, found {show(weight)}")
    return {label: float(weight) for label, weight in weights.items()}  # type: ignore[arg-type]


def _as_column(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10_000:
        return value
    if value is None or isinstance(value, bool | float):
        raise ValueError(f"expected a header name or a column number, found {show(value)}; {_QUOTE_IT}")
    return as_text(value)


def _as_columns(value: object) -> object:
    if not isinstance(value, list | tuple):
        return _as_column(value)
    if not value:
        raise ValueError
    columns = list(map(_as_column, value))
    return columns[0] if len(columns) == 1 else columns


def _as_several(value: object) -> object:
    found = _as_columns(value)
    return found if isinstance(found, list) else [found]


def _as_separator(value: object) -> str:
    if not isinstance(value, str) or len(value) > 100:
        raise ValueError
    return value and as_text(value)


def said(words: str) -> JsonSchema:
    """What a type of its own rules may hold, in words."""
    return JsonSchema({"type": "string", "format": words})


def matching(pattern: str) -> Any:
    """Text of this form."""
    return Field(strict=True, pattern=rf"\A({pattern})\z")


_UNSET = BeforeValidator(lambda value: None if value == "" else value)  # as run_glue's "" meant
OFF = BeforeValidator(lambda value: "off" if value is False else value)  # PyYAML reads an unquoted off so
NO = BeforeValidator(lambda value: "no" if value is False else value)
ONE_OR_MORE = BeforeValidator(lambda value: [value] if isinstance(value, str | os.PathLike) else value)
Switch = Annotated[bool, Field(strict=True)]
Whole = Annotated[int, Field(strict=True)]
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Real = Annotated[Finite, BeforeValidator(as_number)]
Text = Annotated[Annotated[str, PlainValidator(as_text), said("a text")] | None, _UNSET]
_Path = Annotated[str, PlainValidator(as_path), said("a path")]
Path = Annotated[_Path | None, _UNSET]
Paths = Annotated[list[_Path], Field(min_length=1), ONE_OR_MORE, said("one path or several")] | None
Label = Annotated[str, PlainValidator(as_label), said("a label")] | None
Labels = Annotated[list[str], PlainValidator(_as_labels), said("a list of at least two labels")] | None
_WEIGHTS = "balanced, or a weight from 1e-6 to 1e6 by label (label=weight …)"
Weights = Annotated[str | dict[str, float], PlainValidator(_as_weights), said(_WEIGHTS)] | None
_COLUMN = "a header name, or a column number (from 0; -1 is the last)"
NamedColumn = Annotated[int | str, PlainValidator(_as_column), said(_COLUMN)]
Column = Annotated[int | str, PlainValidator(_as_column), said(f"auto, {_COLUMN}")]
_Columns = int | str | list[int | str]
Columns = Annotated[_Columns, PlainValidator(_as_columns), said(f"auto, {_COLUMN}, or several of these")]
_SEVERAL = Annotated[list[int | str], PlainValidator(_as_several), said(f"{_COLUMN}, or several of these")]
NamedColumns = _SEVERAL | None
Separator = Annotated[str, PlainValidator(_as_separator), said("a text of at most 100 characters")]
_DEVICES = "auto, cpu, mps, cuda or cuda:N"
Device = Annotated[str, matching(r"auto|cpu|mps|cuda(:[0-9]{1,3})?"), said(_DEVICES)]
Amp = Annotated[Literal["auto", "off", "bf16", "fp16"], OFF]
