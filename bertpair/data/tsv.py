"""A TSV file → texts and labels; every fault with its file and line.

Texts come back verbatim, labels without surrounding spaces. Every row that cannot be used is named; none is
dropped unless `on_bad_row: skip` asks for it, and then it is counted and listed.
"""

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bertpair.data.columns import (
    Columns,
    FirstRow,
    Misfits,
    Places,
    check_header,
    is_quoted,
    locate_columns,
    near_miss,
    other_format,
)
from bertpair.data.records import Record, is_blank, read_records
from bertpair.errors import ConfigError, DataError, list_faults, listed, show
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
    and logs them; a file that cannot be read at all, or has no good row, is an error in both. `limit`: so
    many good rows, no more; the log then says of how many, and names the setting `limit_name`.
    """
    if on_bad_row not in ("error", "skip"):
        raise ConfigError(f"on_bad_row: found {on_bad_row!r}; allowed: error, skip")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit: found {limit}; allowed: 1 or more")
    reader = _Reader(columns, labels, regression, limit, skips=on_bad_row == "skip")
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
        found = f"only the label {show(values[0])} in all {len(values):,} rows" if values else "no labels"
        raise DataError(f"training data: found {found}; at least two different labels are needed")


@dataclass
class _File:
    """The file that is being read, and where the reader's lists stood before it."""

    path: str
    num_shown: int
    num_faults: int
    num_good: int
    header: list[str] | None = None  # the cells that are read
    num_filled: int = 0  # cells of the first row, up to the last one with something in it
    first: FirstRow | None = None  # below the header, if there is one
    first_line: int = 0
    places: Places | None = None
    num_rows: int = 0
    num_tried: int = 0  # those within the limit
    num_short: int = 0  # good rows with fewer cells than the first one
    first_short: int = 0
    misfits: Misfits = field(default_factory=Misfits)


class _Reader:
    """Collects rows and faults over all files."""

    def __init__(
        self,
        columns: Columns,
        labels: Sequence[str] | None,
        regression: bool,
        limit: int | None,
        skips: bool,
    ) -> None:
        self.columns = columns
        self.allowed = None if labels is None or regression else dict.fromkeys(labels)
        self.regression = regression
        self.limit = limit
        self.skips = skips
        self.text_a: list[str] = []
        self.text_b: list[str] = []
        self.labels: list[str] = []
        self.files: list[str] = []
        self.file_of_row: list[int] = []
        self.line_of_row: list[int] = []
        self.header: tuple[str, ...] | None = None
        self.here = _File("", 0, 0, 0)
        self.headers: list[tuple[str, str | None, str | None]] = []  # where, the label's cell, a number
        self.first_rows: list[int] = []  # of files without a header
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
        self.here = here = _File(path, len(self.faults), self.num_faults, len(self.text_a))
        empty_lines: list[int] = []  # faults only if a row follows: at the end of a file they are harmless
        records = read_records(path, self.columns.quoting)
        for record in records:
            stop_flag.raise_if_set()
            if not record.cells:
                empty_lines.append(record.line)
                continue
            if here.places is None:
                here.places = self._start(record, empty_lines, records)
                if self.columns.has_header:
                    continue
            if here.first is None:
                here.first = FirstRow(record.cells, here.places, self.allowed or ())
                here.first_line = record.line
            else:
                here.first.compare(record.cells)
            for each in empty_lines:
                self.note(f"{path}:{each}: an empty line; expected at least {here.places.needed} columns")
            empty_lines.clear()
            here.num_rows += 1
            if not self.is_full:
                self._add(record, here.places)
        self._close()

    def _start(self, record: Record, empty_lines: list[int], records: Iterator[Record]) -> Places:
        """Find the columns in a file's first row, which is its header if it has one."""
        where, cells, here = f"{self.here.path}:{record.line}: ", record.cells, self.here
        if self.columns.has_header and (record.fault or empty_lines):
            raise DataError(
                where + (record.fault or "the header row is expected in the first line, not after empty ones")
            )
        other = other_format(cells, self.columns)
        if other or (self.columns.has_header and len(cells) == 1 and self.columns.num_used > 1):
            following = next((each.cells for each in records if each.cells), [])
            if len(following) > 1:
                raise DataError(f"{where}expected tabs as in the next row, found none in {listed(cells)}")
            if other:
                raise DataError(f"{where}looks {other}")
            raise DataError(f"{where}expected tabs between the columns, found none in {listed(cells)}")
        here.num_filled = max((place + 1 for place, cell in enumerate(cells) if cell.strip()), default=0)
        if self.columns.has_header:
            check_header(where, cells, self.columns.quoting)
        places = locate_columns(self.columns, cells, where)
        if not self.columns.has_header:
            return places
        here.header = self._used(cells, places)
        if self.header is None:
            self.header = tuple(cell.strip() for cell in cells)
        number = None
        if self.columns.header is None:  # further files must agree with this one
            self.columns = replace(self.columns, header=self.header)
            number = next(filter(_WHOLE.fullmatch, cells), None)
        label = None if places.label is None else cells[places.label].strip()
        self.headers.append((where, label, number))
        return places

    def _close(self) -> None:
        """What a whole file shows; DataError where that leaves nothing to be read from it."""
        here = self.here
        self.num_rows += here.num_rows
        if not here.num_rows:
            raise DataError(
                f"{here.path}: " + ("only a header row, no rows" if here.places else "the file is empty")
            )
        num_others = here.num_tried - (self._good_first_row() and not self.columns.has_header)
        if here.places and num_others > 1 and here.misfits.is_all_of(num_others):
            self.num_faults = here.num_faults  # one line says it for all
            del self.faults[here.num_shown :]
            raise DataError(f"{here.path}: {here.misfits.message(here.places, self.columns)}")
        if self.skips and here.num_tried and len(self.text_a) == here.num_good:
            faults = list_faults(self.faults[here.num_shown :], self.num_faults - here.num_faults)
            raise DataError(f"{here.path}: not one good row:\n{faults}")
        if here.first is not None and self._good_first_row():
            self._check_first_row(here.first)
        if here.num_short:
            said = "%s: rows with fewer columns than the first, counted from the left: %d, as in line %d"
            logger.warning(said, here.path, here.num_short, here.first_short)

    def _good_first_row(self) -> bool:
        return self.line_of_row[self.here.num_good : self.here.num_good + 1] == [self.here.first_line]

    def _check_first_row(self, first: FirstRow) -> None:
        """Say what is known of a first row that was read as a row; DataError if it is a header."""
        here = self.here
        where = f"{here.path}:{here.first_line}: "
        if not first.check(where, self.columns) or self.columns.has_header:
            return
        self.first_rows.append(here.num_good)
        if self.columns.label is None:
            texts = [column[here.num_good] for column in (self.text_a, self.text_b) if column]
            logger.info("%sread as a row, not as a header: %s", where, listed(texts))

    def _add(self, record: Record, places: Places) -> None:
        here, cells = self.here, record.cells
        here.num_tried += 1
        fault = record.fault or self._fault(cells, places) or self._header_again(cells, places)
        if fault:
            self.note(f"{here.path}:{record.line}: {fault}")
            return
        if len(cells) < here.num_filled:
            here.first_short = here.first_short or record.line
            here.num_short += 1
        self.text_a.append(cells[places.text_a])
        if places.text_b is not None:
            self.text_b.append(cells[places.text_b])
        if places.label is not None:
            self.labels.append(cells[places.label].strip())
        self.file_of_row.append(len(self.files) - 1)
        self.line_of_row.append(record.line)

    def _used(self, cells: list[str], places: Places) -> list[str]:
        """The cells that are read."""
        used = (places.text_a, places.text_b, places.label)
        return [cells[place].strip() for place in used if place is not None]

    def _header_again(self, cells: list[str], places: Places) -> str:
        if self.here.header is None or self._used(cells, places) != self.here.header:
            return ""
        return "the header row again; was one file appended to another? If it is a row, set has_header: false"

    def _fault(self, cells: list[str], places: Places) -> str:
        """What is wrong with a row whose bytes are text, or ""."""
        if len(cells) < places.needed:
            if len(cells) == 1 or not self.columns.has_header:
                self.here.misfits.note(cells)
            return f"expected at least {places.needed} tab-separated columns, found {len(cells)}"
        if any(cell.strip() for cell in cells[places.width :]):
            self.here.misfits.note(cells)
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
            point = label.replace(",", ".")
            hint = f"did you mean {show(point)}? " if "," in label and _number(point) is not None else ""
            expected = f"{hint}problem_type: regression takes numbers up to 1e18"
        else:
            expected = "a label is expected"
        if not label:
            return f"label_column {self.columns.label!r} is empty; {expected}"
        if self.allowed is None and not self.regression:
            return ""
        is_first = not self.columns.has_header and self.here.num_rows == 1
        hint = "; if this row is a header, set --has_header true or remove it" if is_first else ""
        return f"{'label' if self.regression else 'unknown label'} {show(label)}; {expected}{hint}"

    def result(self) -> Pairs:
        if not self.files:
            raise DataError("no file to read")
        if self.num_faults:
            faults = list_faults(self.faults, self.num_faults, _SHOWN_FAULTS)
            logger.warning("bad rows skipped: %d (on_bad_row: skip)\n%s", self.num_faults, faults)
        self._warn_of_headers()
        if self.columns.quoting == "none" and len(self.text_a) > 1 and all(map(is_quoted, self.text_a)):
            logger.warning("%s: all texts are in quotes; --quoting csv takes them off", ", ".join(self.files))
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
        counts = Counter(self.labels)
        for where, label, number in self.headers:
            found = "" if number is None else f"it holds {number}"
            if label and (label in counts or (self.regression and _number(label) is not None)):
                found = f"its label column holds {show(label)}"
            if found:
                advice = "if it is one, set has_header: false"
                logger.warning("%sread as the header, but %s like a row; %s", where, found, advice)
        lone = [label for label, count in counts.items() if count == 1]
        for row in self.first_rows if self.allowed is None and not self.regression and len(lone) == 1 else ():
            if self.labels[row] == lone[0]:
                where = f"{self.files[self.file_of_row[row]]}:{self.line_of_row[row]}"
                advice = "if it is a header, set has_header: true"
                logger.warning("%s: no other row has its label, %s; %s", where, show(lone[0]), advice)


def _number(text: str) -> float | None:
    """The number that the text is, or None where it is none or its square is no float32."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if abs(number) <= _LARGEST and "_" not in text else None
