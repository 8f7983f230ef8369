"""What one setting may hold: kinds of values, read from words of a command line or from a YAML file.

A `Kind` accepts a value or raises ValueError; `convert` turns that into a complaint that says what was
expected and what was found. Types are strict: a quoted number is text, except that every float may be text,
because PyYAML reads 2e-5 as a string.
"""

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bertpair.errors import half_character, near_misses, plain, show

Accept = Callable[[object], object]

_WHOLE = re.compile(r"[-+]?[0-9]{1,18}")
NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_MANY = 2**31 - 1
_QUOTE_IT = "YAML reads an unquoted yes, no, on, off, true, null or number as something else: quote it"


def first_word(words: Sequence[str]) -> object:
    """A word as YAML would give it: `null` is null, everything else is text."""
    return None if words[0] == "null" else words[0]


@dataclass(frozen=True)
class Kind:
    """`expected` in words; `accept` gives the typed value or raises ValueError (with a message or none).

    `read` turns the words after a flag into such a value: one word, at most one ("maybe"), or several.
    """

    expected: str
    accept: Accept
    read: Callable[[Sequence[str]], object] = first_word
    arity: Literal["one", "maybe", "many"] = "one"


def convert(kind: Kind, value: object) -> object:
    """The typed value; ValueError with the whole complaint otherwise."""
    try:
        return kind.accept(value)
    except ValueError as error:
        raise ValueError(str(error) or f"expected {kind.expected}, found {show(value)}") from None


def suggest(name: str, known: Iterable[str]) -> str:
    """`; did you mean …?`, or nothing if no known name is near."""
    near = near_misses(name, known)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def convert_all(
    kinds: Mapping[str, Kind], raw: Mapping[str, object], where: Mapping[str, str]
) -> tuple[dict[str, Any], list[str]]:
    """Typed values of the sound ones, and the faults of the others, each led by its place in `where`."""
    values: dict[str, Any] = {}
    faults: list[str] = []
    for name, value in raw.items():
        if name not in kinds:
            place = where.get(name, "").removesuffix(name)
            faults.append(f"{place}unknown setting {plain(name)}{suggest(name, kinds)}")
            continue
        try:
            values[name] = convert(kinds[name], value)
        except ValueError as error:
            faults.append(f"{where.get(name, name)}: {error}")
    return values, faults


def or_null(kind: Kind) -> Kind:
    """The same, and null."""
    return Kind(
        f"{kind.expected}, or null",
        lambda value: None if value is None else kind.accept(value),
        lambda words: None if list(words) == ["null"] else kind.read(words),
        kind.arity,
    )


def whole(low: int, high: int = _MANY, *, also: int | None = None) -> Kind:
    """An integer of low to high, or `also`."""
    bounds = f"of at least {low}" if high == _MANY else f"from {low} to {high}"
    expected = f"a whole number {bounds}" + ("" if also is None else f", or {also}")

    def accept(value: object) -> object:
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError
        if value != also and not low <= value <= high:
            raise ValueError
        return value

    return Kind(expected, accept, _read_whole)


def _read_whole(words: Sequence[str]) -> object:
    return int(words[0]) if _WHOLE.fullmatch(words[0]) else first_word(words)


def number(
    *, above: float = -math.inf, low: float = -math.inf, high: float = math.inf, below: float = math.inf
) -> Kind:
    """A finite float within the bounds."""
    bounds = [("above", above), ("of at least", low), ("at most", high), ("below", below)]
    said = " and ".join(f"{word} {bound:g}" for word, bound in bounds if math.isfinite(bound))

    def accept(value: object) -> object:
        number = _finite(value)
        if not (number > above and number >= low and number <= high and number < below):
            raise ValueError
        return number

    return Kind(f"a number {said}".strip(), accept)


def _finite(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError
    if isinstance(value, str) and not NUMBER.fullmatch(value):
        raise ValueError
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError
    return number


def _accept_switch(value: object) -> object:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _read_switch(words: Sequence[str]) -> object:
    if not words:
        return True
    return {"true": True, "false": False}.get(words[0].lower(), first_word(words))


SWITCH = Kind("true or false", _accept_switch, _read_switch, "maybe")


def choice(*allowed: str) -> Kind:
    """One of the words allowed."""
    expected = allowed[0] if len(allowed) == 1 else f"one of {', '.join(allowed)}"
    negative = [word for word in allowed if word in ("no", "off")]

    def accept(value: object) -> object:
        if value is False and negative:  # PyYAML reads an unquoted off or no as false
            return negative[0]
        if value not in allowed:
            raise ValueError
        return value

    return Kind(expected, accept)


def clean_text(value: object) -> str:
    """Text that can be written to YAML and handed to the system; ValueError otherwise."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str) or not value:
        raise ValueError
    if "\0" in value or half_character(value) is not None:
        raise ValueError(f"expected text without NUL or bytes that are not UTF-8, found {show(value)}")
    return value


def clean_path(value: object) -> str:
    """The same for a path; `~` is the home folder."""
    text = clean_text(value)
    if text.isspace():
        raise ValueError(f"expected a path, found {show(text)}")
    return os.path.expanduser(text)


# run_glue's "" meant: not set
TEXT = Kind("text, or null", lambda value: None if value in (None, "") else clean_text(value))
PATH = Kind("a path, or null", lambda value: None if value in (None, "") else clean_path(value))


def several(expected: str, accept: Accept) -> Kind:
    """A list of at least one, or one alone, or null."""

    def accept_all(value: object) -> object:
        found = list(value) if isinstance(value, list | tuple) else [value]
        if not found:
            raise ValueError
        return [accept(item) for item in found]

    return or_null(Kind(expected, accept_all, list, "many"))


def matching(expected: str, pattern: str) -> Kind:
    """Text of this form."""

    def accept(value: object) -> object:
        text = clean_text(value)
        if not re.fullmatch(pattern, text):
            raise ValueError
        return text

    return Kind(expected, accept)


PATHS = several("one path or several", clean_path)


def clean_label(value: object) -> str:
    """A label as text; a plain whole number is one too, anything else that YAML made of it is refused."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:d}"
    if not isinstance(value, str):
        raise ValueError(f"expected labels that are text, found {show(value)}; {_QUOTE_IT}")
    if not value.strip():
        raise ValueError("expected labels that are not empty, found an empty one")
    return clean_text(value)


def _accept_labels(value: object) -> object:
    if not isinstance(value, list | tuple):
        raise ValueError
    labels = [clean_label(item) for item in value]
    if len(labels) < 2:
        raise ValueError(f"expected at least two labels, found {', '.join(map(show, labels)) or 'none'}")
    _refuse_twice(labels)
    return labels


def _refuse_twice(labels: Sequence[str]) -> None:
    twice = [show(label) for label, count in Counter(labels).items() if count > 1]
    if twice:
        raise ValueError(f"expected every label once, found {', '.join(twice[:5])} more than once")


LABEL = or_null(Kind("a label", clean_label))
LABELS = or_null(Kind("a list of at least two labels", _accept_labels, list, "many"))


def _accept_weights(value: object) -> object:
    if value == "balanced":
        return value
    if not isinstance(value, Mapping) or not value:
        raise ValueError
    weight = number(low=1e-6, high=1e6)  # float32 holds a sum of losses so weighted
    labels = [clean_label(label) for label in value]
    _refuse_twice(labels)
    return {label: convert(weight, item) for label, item in zip(labels, value.values(), strict=True)}


def _read_weights(words: Sequence[str]) -> object:
    pairs = [word.rpartition("=") for word in words]
    if list(words) == ["balanced"] or not all(label for label, _, _ in pairs):
        return words[0]
    return {label: weight for label, _, weight in pairs}


WEIGHTS = or_null(
    Kind(
        "balanced, or a weight from 1e-6 to 1e6 by label (label=weight …)",
        _accept_weights,
        _read_weights,
        "many",
    )
)


def _accept_column(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10_000:
        return value
    if value is None or isinstance(value, bool | float):
        raise ValueError(f"expected a header name or a column number, found {show(value)}; {_QUOTE_IT}")
    return clean_text(value)


COLUMN = Kind("auto, a header name, or a column number (from 0; -1 is the last)", _accept_column, _read_whole)


def _accept_header(value: object) -> object:
    return value if isinstance(value, bool) or value == "auto" else choice("auto").accept(value)


HEADER = Kind("auto, true or false", _accept_header, _read_switch, "maybe")


def _accept_resume(value: object) -> object:
    if isinstance(value, bool):
        return "auto" if value else False
    return clean_path(value)


RESUME = Kind("false, auto or the path of a checkpoint", _accept_resume, _read_switch, "maybe")


DEVICE = matching("auto, cpu, mps, cuda or cuda:N", r"auto|cpu|mps|cuda(:[0-9]{1,3})?")


def _accept_reports(value: object) -> object:
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list | tuple) or list(found) != ["none"]:
        raise ValueError
    return ["none"]


REPORTS = Kind("none, the only one there is for now", _accept_reports, list, "many")
