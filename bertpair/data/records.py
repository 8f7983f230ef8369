"""The lines of a file → rows of cells, each with the line it starts on.

Parsed by hand: Python's csv module ends lines at a lone carriage return, str.splitlines at U+2028 and
friends, and neither says where a quote was opened. Of JSON objects, the names in the first one come first,
as the header of a table would, and the cells of each follow in their order.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from bertpair.data.formats import TSV, Format
from bertpair.data.lines import STDIN, name_of, read_lines
from bertpair.data.objects import as_text, check_object_lines, names_fault, odd_values, parse_object
from bertpair.errors import DataError


class Record(NamedTuple):
    """One row: the line it starts on (from 1), its cells (none: an empty line), what is wrong or "".

    `odd`: what is wrong with single cells, which only matters where they are read.
    """

    line: int
    cells: list[str]
    fault: str
    odd: Mapping[int, str] = {}


def read_records(path: str, form: Format = TSV) -> Iterator[Record]:
    """Every row of the file, the header too; DataError if it cannot be read or a quote is never closed.

    A field that begins with a quote, where these mean something, ends at the next single one. `-` is the
    standard input.
    """
    if form.has_names:
        yield from _read_objects(path)
        return
    lines, delimiter, has_quotes = read_lines(path), form.delimiter, form.has_quotes
    has_commas = delimiter == ","  # alone in the empty rows of a spreadsheet
    for number, line, fault in lines:
        if has_quotes and '"' in line:
            yield _quoted_record(path, form, number, line, fault, lines)
        elif not line or line.isspace() or (has_commas and not line.strip(", \t\r")):
            yield Record(number, [], fault)
        else:
            yield Record(number, line.removesuffix("\r").split(delimiter), fault)


def first_row(path: Path | str, form: Format = TSV) -> list[str]:
    """The cells of the first line, or the names in its object; DataError if there is none, or it is empty or
    not text, or would be taken from the standard input."""
    name = os.fspath(path)
    if name == STDIN:
        raise DataError(f"{name_of(name)}: is read only once, by whoever reads its rows")
    for line, cells, fault, _ in read_records(name, form):
        if fault or not cells:
            raise DataError(f"{name}:{line}: {fault or 'an empty line; the first row is expected here'}")
        return cells
    raise DataError(f"{name}: the file is empty")


def _read_objects(path: str) -> Iterator[Record]:
    names: list[str] | None = None
    for number, line, fault in read_lines(path):
        if not line or line.isspace():
            yield Record(number, [], fault)
            continue
        if names is None:
            check_object_lines(f"{name_of(path)}:{number}: ", line)
        found, fault = ({}, fault) if fault else parse_object(line)
        if names is None:
            names = list(found)
            yield Record(number, names or [line], fault or names_fault(names))
        yield Record(
            number, [as_text(found.get(name)) for name in names], fault, odd_values(found, names, line)
        )


def _quoted_record(
    path: str, form: Format, start: int, line: str, fault: str, lines: Iterator[tuple[int, str, str]]
) -> Record:
    """The row that begins with this line; a field in quotes takes further `lines`."""
    number, position, cells = start, 0, []
    while position <= len(line):
        parts: list[str] = []
        is_quoted = line.startswith('"', position)
        if is_quoted:
            opened, position = number, position + 1
            while (end := _closing_quote(line, position)) < 0:
                parts += line[position:], "\n"
                following = next(lines, None)
                if following is None:
                    raise DataError(f"{name_of(path)}:{opened}: {_NEVER_CLOSED[form.delimiter]}")
                number, line, found = following
                fault = fault or (f"line {number}: {found}" if found else "")
                position = 0
            parts.append(line[position:end])
            position = end + 1
        end = line.find(form.delimiter, position)
        rest = line[position:] if end < 0 else line[position:end]
        rest = rest.removesuffix("\r") if end < 0 else rest
        position = len(line) + 1 if end < 0 else end + 1
        if is_quoted and rest and not rest.isspace():
            fault = fault or "text after a closing quote; inside quotes, a quote is written twice"
        cells.append("".join(parts).replace('""', '"') + rest)
    return Record(start, cells, fault)


_NEVER_CLOSED = {
    "\t": "the quote opened here is never closed; quoting: none takes quotes literally",
    ",": "the quote opened here is never closed; inside quotes, a quote is written twice",
}


def _closing_quote(line: str, position: int) -> int:
    end = line.find('"', position)
    while end >= 0 and line.startswith('"', end + 1):
        end = line.find('"', end + 2)
    return end


INVISIBLE = (
    r"\u0000-\u0020\u007f-\u00a0\u00ad\u034f\u0600-\u0605\u061c\u06dd\u070f\u0890-\u0891\u08e2\u115f-\u1160\u1680"
    r"\u17b4-\u17b5\u180b-\u180f\u2000-\u200f\u2028-\u202f\u205f-\u206f\u2800\u3000\u3164\ufe00-\ufe0f\ufeff"
    r"\uffa0\ufff0-\ufffb"
    "\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
_VISIBLE = re.compile(f"[^{INVISIBLE}]")
_HIDDEN = re.compile(f"[{INVISIBLE}]+")


def without_invisible(text: str) -> str:
    """What can be seen of it."""
    return _HIDDEN.sub("", text)


def is_blank(text: str) -> bool:
    """Whether there is nothing to see in it."""
    return _VISIBLE.search(text) is None
