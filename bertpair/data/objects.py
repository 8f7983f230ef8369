"""A line of JSON → the cells of a row: text stays as it is, and a number as it is written."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from bertpair.errors import DataError, half_character, show
from bertpair.settings.files import unique_keys

_KINDS: dict[type, str] = {list: "a list", dict: "an object"}
_WORDS = {True: "true", False: "false"}


def check_object_lines(where: str, line: str) -> None:
    """DataError for a first line that begins one list of all rows, or an object over several lines."""
    text = line.strip()
    if text.startswith("["):
        raise DataError(f"{where}looks like a JSON list; write one object a line: jq -c '.[]' OLD > NEW")
    if text == "{":
        raise DataError(f"{where}looks like JSON over several lines; one object a line: jq -c . OLD > NEW")


def parse_object(line: str) -> tuple[dict[str, Any], str]:
    """The object in a line, its numbers as text; and what is wrong with it or ""."""
    try:
        found = json.loads(
            line, object_pairs_hook=unique_keys, parse_int=str, parse_float=str, parse_constant=str
        )
    except json.JSONDecodeError as error:
        return {}, f"no JSON object: {error.msg} (character {error.pos + 1} of the line)"
    except RecursionError:
        return {}, "no JSON object of plain values: nested too deeply"
    except ValueError as error:  # a key twice
        return {}, str(error)
    if not isinstance(found, dict):
        return {}, f"expected a JSON object, found {_KINDS.get(type(found), 'a single value')}"
    return found, ""


def as_text(value: Any) -> str:
    """A value as a cell; a list or an object, which is no text, is empty, as null is."""
    return value if isinstance(value, str) else _WORDS.get(value, "") if isinstance(value, bool) else ""


def odd_values(found: Mapping[str, Any], names: Sequence[str], line: str) -> dict[int, str]:
    """What is wrong with the values that are no text, by the place of their names."""
    if "\\u" not in line and line.count("{") == 1 and "[" not in line:  # as in most lines
        return {}
    faults = {place: _value_fault(found.get(name)) for place, name in enumerate(names)}
    return {place: fault for place, fault in faults.items() if fault}


def names_fault(names: Sequence[str]) -> str:
    """What is wrong with the first name that is no text, or ""."""
    return next((f"the name {show(name)} {fault}" for name in names if (fault := _value_fault(name))), "")


def _value_fault(value: Any) -> str:
    if isinstance(value, list | dict):
        return f"is {_KINDS[type(value)]}; a text is expected"
    if isinstance(value, str) and "\0" in value:
        return "holds a NUL; text is expected"
    if isinstance(value, str) and half_character(value) is not None:
        return "holds half of a surrogate pair; text is expected"
    return ""
