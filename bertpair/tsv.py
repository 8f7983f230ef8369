"""A TSV file → texts and labels; every fault with its file and line.

Texts come back verbatim, labels without surrounding spaces. Every row that cannot be used is named; none is
dropped unless `on_bad_row: skip` asks for it, and then it is counted and listed.
"""

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bertpair.blank import is_blank
from bertpair.columns import Columns, Places, listed, locate_columns, near_miss, other_format, shown
from bertpair.errors import ConfigError, DataError, list_faults
from bertpair.records import read_records
from bertpair.runtime import stop_flag

__all__ = ["Columns", "Pairs", "check_two_classes", "find_labels", "first_row", "read_pairs"]

logger = logging.getLogger(__name__)

_SHOWN_FAULTS = 10
_WHOLE = re.compile(r"[+-]?[0-9]{1,4000}")  # int() refuses more digits
_LARGEST = 1e18  # its square, of which the loss is made, is still a float32


@dataclass(frozen=True, eq=False)
class Pairs:
    """Rows in the files' order; row i is line `line_of_row[i]` (from 1) of `files[file_of_row[i]]`."""

    text_a: list[str]
    text_b: list[str] | None
    labels: list[str] | None
    files: tuple[str, ...]
    file_of_row: NDArray[np.int32]
    line_of_row: NDArray[np.int32]
    header: tuple[str, ...] | None = None  # of the first file; None: it has none
    skipped: tuple[str, ...] = ()
    num_skipped: int = 0

    def __len__(self) -> int:
        return len(self.text_a)

    def where(self, row: int) -> str:
        """`train.tsv:17`"""
        return f"{self.files[self.file_of_row[row]]}:{self.line_of_row[row]}"


def read_pairs(
    paths: Sequence[Path | str],
    columns: Columns,
    *,
    labels: Sequence[str] | None = None,
    regression: bool = False,
    on_bad_row: str = "error",
    limit: int | None = None,
    limit_name: str = "limit",
) -> Pairs:
    """Read the files one after the other; texts come back verbatim, labels without surrounding spaces.

    `labels`: a label outside them is a bad row. `regression`: a label must be a finite number.
    `on_bad_row`: `error` raises a DataError with the first ten faults, `skip` leaves bad rows out, counts
    and logs them; a file that cannot be read at all is an error in both. `limit`: so many good rows, no more;
    the log then says of how many, and names the setting `limit_name`.
    """
    if on_bad_row not in ("error", "skip"):
        raise ConfigError(f"on_bad_row: found {on_bad_row!r}; allowed: error, skip")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit: found {limit}; allowed: 1 or more")
    reader = _Reader(columns, labels, regression, limit)
    broken = []
    for path in paths:
        try:
            reader.read(os.fspath(path))
        except DataError as error:
            broken.append(str(error))
            reader.note(str(error))
    if on_bad_row == "error" and reader.num_faults:
        raise DataError(list_faults(reader.faults, reader.num_faults, _SHOWN_FAULTS))
    if broken:
        raise DataError(list_faults(broken, limit=_SHOWN_FAULTS))
    if reader.num_rows > len(reader.text_a) and reader.is_full:
        logger.info("%s: the first %s of %s rows", limit_name, f"{limit:,}", f"{reader.num_rows:,}")
    return reader.result()


def first_row(path: Path | str, quoting: str = "none") -> list[str]:
    """The cells of the first line; DataError if there is none, or it is empty or not text."""
    name = os.fspath(path)
    for line, cells, fault in read_records(name, quoting):
        if fault or not cells:
            raise DataError(f"{name}:{line}: {fault or 'an empty line; the first row is expected here'}")
        return cells
    raise DataError(f"{name}: the file is empty")


def find_labels(values: Sequence[str]) -> tuple[str, ...]:
    """The labels in id order: sorted as numbers if all are integers, else by code point.

    DataError for fewer than two, and for more than twenty numbers of which some are not whole: scores.
    """
    check_two_classes(values)
    labels = sorted(set(values))
    not_whole = _not_whole(labels)
    if len(labels) > 20 and not_whole:
        raise DataError(
            f"the label column holds {len(labels)} different numbers, some not whole (such as "
            f"{not_whole[0]}); set problem_type: regression to train on scores, or list the classes in labels"
        )
    if all(_WHOLE.fullmatch(label) for label in labels):
        labels.sort(key=int)
    return tuple(labels)


def _not_whole(labels: Sequence[str]) -> list[str]:
    """Those that are not whole numbers, provided that all are numbers."""
    try:
        return [label for label in labels if not float(label).is_integer()]
    except ValueError:
        return []


def check_two_classes(values: Sequence[str]) -> None:
    """DataError unless at least two different labels occur."""
    different = set(values)
    if len(different) < 2:
        found = f"only the label {shown(values[0])} in all {len(values):,} rows" if values else "no labels"
        raise DataError(f"training data: found {found}; at least two different labels are needed")


class _Reader:
    """Collects rows and faults over all files."""

    def __init__(
        self,
        columns: Columns,
        labels: Sequence[str] | None,
        regression: bool,
        limit: int | None,
    ) -> None:
        self.columns = columns
        self.allowed = None if labels is None or regression else dict.fromkeys(labels)
        self.regression = regression
        self.limit = limit
        self.text_a: list[str] = []
        self.text_b: list[str] = []
        self.labels: list[str] = []
        self.files: list[str] = []
        self.file_of_row: list[int] = []
        self.line_of_row: list[int] = []
        self.header: tuple[str, ...] | None = None
        self.header_here: list[str] | None = None  # the cells that are read, of this file's header
        self.headers: list[tuple[str, str]] = []  # where, and what stands there in the label's column
        self.faults: list[str] = []
        self.num_faults = 0
        self.num_rows = 0  # those beyond the limit too

    @property
    def is_full(self) -> bool:
        return self.limit is not None and len(self.text_a) >= self.limit

    def note(self, fault: str) -> None:
        self.num_faults += 1
        if len(self.faults) < _SHOWN_FAULTS:
            self.faults.append(fault)

    def read(self, path: str) -> None:
        """All rows of one file, or as many as the limit wants; DataError if there is nothing to read."""
        self.files.append(path)
        self.header_here = None
        places: Places | None = None
        empty_lines: list[int] = []  # faults only if a row follows: at the end of a file they are harmless
        num_rows = 0
        for line, cells, fault in read_records(path, self.columns.quoting):
            stop_flag.raise_if_set()
            if not cells:
                empty_lines.append(line)
                continue
            if places is None:
                places = self._start(f"{path}:{line}: ", cells, fault, empty_lines)
                if self.columns.has_header:
                    continue
            for each in empty_lines:
                self.note(f"{path}:{each}: an empty line; expected at least {places.needed} columns")
            empty_lines.clear()
            num_rows += 1
            if not self.is_full:
                self._add(line, cells, fault, places)
        self.num_rows += num_rows
        if not num_rows:
            raise DataError(f"{path}: " + ("only a header row, no rows" if places else "the file is empty"))

    def _start(self, where: str, cells: list[str], fault: str, empty_lines: list[int]) -> Places:
        if self.columns.has_header and (fault or empty_lines):
            raise DataError(
                where + (fault or "the header row is expected in the first line, not after empty ones")
            )
        if other := other_format(cells, self.columns):
            raise DataError(f"{where}{other}")
        places = locate_columns(self.columns, cells, where)
        if self.columns.has_header:
            self.header_here = self._used(cells, places)
            if self.header is None:
                self.header = tuple(cell.strip() for cell in cells)
            if self.columns.header is None:  # further files must agree with this one
                self.columns = replace(self.columns, header=self.header)
        if self.columns.has_header and places.label is not None:
            self.headers.append((where, cells[places.label].strip()))
        return places

    def _add(self, line: int, cells: list[str], fault: str, places: Places) -> None:
        fault = fault or self._fault(cells, places) or self._header_again(cells, places)
        if fault:
            self.note(f"{self.files[-1]}:{line}: {fault}")
            return
        self.text_a.append(cells[places.text_a])
        if places.text_b is not None:
            self.text_b.append(cells[places.text_b])
        if places.label is not None:
            self.labels.append(cells[places.label].strip())
        self.file_of_row.append(len(self.files) - 1)
        self.line_of_row.append(line)

    def _used(self, cells: list[str], places: Places) -> list[str]:
        """The cells that are read."""
        used = (places.text_a, places.text_b, places.label)
        return [cells[place].strip() for place in used if place is not None]

    def _header_again(self, cells: list[str], places: Places) -> str:
        if self.header_here is None or self._used(cells, places) != self.header_here:
            return ""
        return "the header row again; was one file appended to another?"

    def _fault(self, cells: list[str], places: Places) -> str:
        """What is wrong with a row whose bytes are text, or ""."""
        if len(cells) < places.needed:
            return f"expected at least {places.needed} tab-separated columns, found {len(cells)}"
        if any(cell.strip() for cell in cells[places.width :]):
            return (
                f"expected {places.width} tab-separated columns as in the first row, found {len(cells)}; "
                "is there a tab inside a text?"
            )
        if is_blank(cells[places.text_a]):
            return f"text_a_column {self.columns.text_a!r} is empty; a text is expected"
        if places.text_b is not None and is_blank(cells[places.text_b]):
            return f"text_b_column {self.columns.text_b!r} is empty; a text is expected"
        return "" if places.label is None else self._label_fault(cells[places.label].strip())

    def _label_fault(self, label: str) -> str:
        if self.allowed is not None:
            if label in self.allowed:
                return ""
            expected = f"allowed: {listed(list(self.allowed))}"
            if len(self.faults) < _SHOWN_FAULTS:  # a million of these must not cost a million searches
                expected = near_miss(label, list(self.allowed)) + expected
        elif self.regression:
            if _number(label) is not None:
                return ""
            expected = "problem_type: regression takes numbers up to 1e18"
        else:
            expected = "a label is expected"
        if not label:
            return f"label_column {self.columns.label!r} is empty; {expected}"
        if self.allowed is None and not self.regression:
            return ""
        return f"{'label' if self.regression else 'unknown label'} {shown(label)}; {expected}"

    def result(self) -> Pairs:
        if not self.text_a:
            faults = list_faults(self.faults, self.num_faults, _SHOWN_FAULTS)
            raise DataError(f"{', '.join(self.files) or 'no file'}: not one good row:\n{faults}")
        if self.num_faults:
            faults = list_faults(self.faults, self.num_faults, _SHOWN_FAULTS)
            logger.warning("bad rows skipped: %d (on_bad_row: skip)\n%s", self.num_faults, faults)
        self._warn_of_headers()
        return Pairs(
            self.text_a,
            None if self.columns.text_b is None else self.text_b,
            None if self.columns.label is None else self.labels,
            tuple(self.files),
            np.array(self.file_of_row, dtype=np.int32),
            np.array(self.line_of_row, dtype=np.int32),
            self.header,
            tuple(self.faults),
            self.num_faults,
        )

    def _warn_of_headers(self) -> None:
        known = set(self.labels)
        for where, cell in self.headers:
            if cell in known or (self.regression and _number(cell) is not None):
                logger.warning(
                    "%sread as the header, but its label column holds %s like a row; if it is one, "
                    "set has_header: false",
                    where,
                    shown(cell),
                )


def _number(text: str) -> float | None:
    """The number that the text is, or None where it is none or its square is no float32."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if abs(number) <= _LARGEST and "_" not in text else None
