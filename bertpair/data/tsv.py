"""TSV files → pairs of texts and their labels; every fault with its file and line.

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

from bertpair.console import stop_flag
from bertpair.data.columns import (
    Columns,
    FirstRow,
    Places,
    check_header,
    is_quoted,
    locate_columns,
    misfit_fault,
    near_miss,
    other_format,
)
from bertpair.data.dataset import Pairs
from bertpair.data.records import Record, is_blank, read_records
from bertpair.errors import DataError, list_faults, listed, show

logger = logging.getLogger(__name__)

_SHOWN_FAULTS = 10
_LARGEST = 1e18  # its square, of which the loss is made, is still a float32


def read_pairs(
    paths: Sequence[Path | str],
    columns: Columns,
    *,
    labels: Sequence[str] | None = None,
    regression: bool = False,
    on_bad_row: str = "error",
    limit: int | None = None,
) -> Pairs:
    """Read the files one after the other.

    With `labels`, another label is a bad row; with `regression`, one that is not a finite number.
    `on_bad_row`: `error` raises a DataError with the first ten faults, `skip` leaves bad rows out, counts
    and lists them; a file that cannot be read, or has no good row, is an error in both. `limit`: the most
    good rows to read.
    """
    allowed = None if labels is None or regression else dict.fromkeys(labels)
    reader = _Reader(columns, allowed, regression, limit, skips=on_bad_row == "skip")
    broken = []
    for path in paths:
        try:
            reader.read(os.fspath(path))
        except DataError as error:
            broken.append(str(error))
            reader.note(str(error))
    faults = [fault for file in reader.files for fault in file.faults]
    num_faults = sum(file.num_faults for file in reader.files)
    all_faults = list_faults(faults, num_faults, _SHOWN_FAULTS)
    if faults and on_bad_row == "error":
        raise DataError(all_faults)
    if broken:
        raise DataError(list_faults(broken, limit=_SHOWN_FAULTS))
    num_rows = sum(file.num_rows for file in reader.files)
    if num_rows > len(reader.text_a) and reader.is_full:
        found = f"{limit:,} of {num_rows:,} rows"
        logger.info("%s: only the first %s", ", ".join(map(str, paths)), found)
    if faults:
        logger.warning("bad rows skipped: %d (on_bad_row: skip)\n%s", num_faults, all_faults)
    reader.warn_of_headers()
    names, starts = zip(*((file.path, file.start) for file in reader.files), strict=True)
    if columns.quoting == "none" and len(reader.text_a) > 1 and all(map(is_quoted, reader.text_a)):
        logger.warning("%s: all texts are in quotes; --quoting csv takes them off", ", ".join(names))
    return Pairs(
        reader.text_a,
        None if columns.text_b is None else reader.text_b,
        None if columns.label is None else reader.labels,
        names,
        np.repeat(np.arange(len(names), dtype=np.int32), np.diff([*starts, len(reader.text_a)])),
        np.array(reader.line_of_row, dtype=np.int32),
        reader.header,
    )


@dataclass
class _File:
    """One file, and what was found in it so far."""

    path: str
    start: int  # how many good rows the files before it have
    places: Places | None = None
    header: list[str] | None = None  # the cells that are read
    num_filled: int = 0  # cells of the first row, up to the last one with something in it
    first: FirstRow | None = None  # below the header, if there is one
    num_rows: int = 0  # those beyond the limit too
    num_tried: int = 0  # those within the limit
    num_short: int = 0  # good rows with fewer cells than the first one
    first_short: int = 0
    misfits: Counter[int] = field(default_factory=Counter)  # rows without the first one's columns, by cells
    misfit: list[str] = field(default_factory=list)  # the first of them
    faults: list[str] = field(default_factory=list)
    num_faults: int = 0


@dataclass
class _Reader:
    """Collects rows over all files."""

    columns: Columns
    allowed: dict[str, None] | None
    regression: bool
    limit: int | None
    skips: bool
    text_a: list[str] = field(default_factory=list)
    text_b: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    files: list[_File] = field(default_factory=list)
    line_of_row: list[int] = field(default_factory=list)
    header: tuple[str, ...] | None = None
    headers: list[tuple[str, str, str | None]] = field(default_factory=list)  # where, label's cell, a number
    first_rows: list[tuple[str, int]] = field(default_factory=list)  # of files without a header: where, row

    @property
    def here(self) -> _File:
        return self.files[-1]

    @property
    def is_full(self) -> bool:
        return self.limit is not None and len(self.text_a) >= self.limit

    def note(self, fault: str) -> None:
        self.here.num_faults += 1
        if len(self.here.faults) < _SHOWN_FAULTS:
            self.here.faults.append(fault)

    def read(self, path: str) -> None:
        """All rows of one file, or as many as the limit wants; DataError if there is nothing to read."""
        here = _File(path, len(self.text_a))
        self.files.append(here)
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
                here.first = FirstRow(record.line, record.cells, here.places, self.allowed or ())
            else:
                here.first.compare(record.cells)
            for each in empty_lines:
                self.note(f"{path}:{each}: an empty line; expected at least {here.places.needed} columns")
            empty_lines.clear()
            here.num_rows += 1
            if not self.is_full:
                self._add(record, here, here.places)
        self._close(here)

    def _start(self, record: Record, empty_lines: list[int], records: Iterator[Record]) -> Places:
        """Find the columns in a file's first row, which is its header if it has one."""
        here, cells, has_header = self.here, record.cells, self.columns.has_header
        where = f"{here.path}:{record.line}: "
        if has_header and (record.fault or empty_lines):
            raise DataError(
                where + (record.fault or "the header row is expected in the first line, not after empty ones")
            )
        other = other_format(cells, self.columns)
        if other or (has_header and len(cells) == 1 and self.columns.num_used > 1):
            following = next((each.cells for each in records if each.cells), [])
            if other and len(following) < 2:
                raise DataError(f"{where}looks {other}")
            place = "as in the next row" if len(following) > 1 else "between the columns"
            raise DataError(f"{where}expected tabs {place}, found none in {listed(cells)}")
        here.num_filled = max((place + 1 for place, cell in enumerate(cells) if cell.strip()), default=0)
        if has_header:
            check_header(where, cells, self.columns.quoting)
        places = locate_columns(self.columns, cells, where)
        if has_header:
            here.header = _used(cells, places)
            number = None
            if self.header is None:
                self.header = tuple(cell.strip() for cell in cells)
            if self.columns.header is None:  # further files must agree with this one
                self.columns = replace(self.columns, header=self.header)
                number = next((cell for cell in cells if re.fullmatch("[+-]?[0-9]+", cell)), None)
            label = "" if places.label is None else cells[places.label].strip()
            self.headers.append((where, label, number))
        return places

    def _close(self, here: _File) -> None:
        """What a whole file shows; DataError where that leaves nothing to be read from it."""
        first, has_header = here.first, self.columns.has_header
        if here.places is None or first is None:
            raise DataError(
                f"{here.path}: " + ("only a header row, no rows" if here.places else "the file is empty")
            )
        is_good = self.line_of_row[here.start : here.start + 1] == [first.line]  # the first row
        num_others = here.num_tried - (is_good and not has_header)
        width, count = next(iter(here.misfits.most_common(1)), (0, 0))
        if num_others > 1 and count == num_others:
            here.faults, here.num_faults = [], 0  # one line says it for all
            fault = misfit_fault(width, count, here.misfit, here.places, self.columns)
            raise DataError(f"{here.path}: {fault}")
        if self.skips and here.num_tried and len(self.text_a) == here.start:
            faults = list_faults(here.faults, here.num_faults)
            raise DataError(f"{here.path}: not one good row:\n{faults}")
        where = f"{here.path}:{first.line}: "
        if is_good and first.check(where, self.columns) and not has_header:
            self.first_rows.append((where, here.start))
            if self.columns.label is None:
                texts = [column[here.start] for column in (self.text_a, self.text_b) if column]
                logger.info("%sread as a row, not as a header: %s", where, listed(texts))
        if here.num_short:
            said = "%s: rows with fewer columns than the first, counted from the left: %d, as in line %d"
            logger.warning(said, here.path, here.num_short, here.first_short)

    def _add(self, record: Record, here: _File, places: Places) -> None:
        cells = record.cells
        here.num_tried += 1
        fault = record.fault or self._fault(cells, here, places)
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
        self.line_of_row.append(record.line)

    def _fault(self, cells: list[str], here: _File, places: Places) -> str:
        """What is wrong with a row whose bytes are text, or ""."""
        is_short = len(cells) < places.needed
        if is_short or any(cell.strip() for cell in cells[places.width :]):
            if not is_short or len(cells) == 1 or not self.columns.has_header:
                here.misfit = here.misfit or cells
                here.misfits[len(cells)] += 1
            if is_short:
                return f"expected at least {places.needed} tab-separated columns, found {len(cells)}"
            return (
                f"expected {places.width} tab-separated columns as in the first row, found {len(cells)}; "
                "is there a tab inside a text?"
            )
        if is_blank(cells[places.text_a]):
            return f"text_a_column {self.columns.text_a!r} is empty; a text is expected"
        if places.text_b is not None and is_blank(cells[places.text_b]):
            return f"text_b_column {self.columns.text_b!r} is empty; a text is expected"
        fault = "" if places.label is None else self._label_fault(cells[places.label].strip())
        if not fault and here.header is not None and _used(cells, places) == here.header:
            return (
                "the header row again; was one file appended to another? "
                "If it is a row, set has_header: false"
            )
        return fault

    def _label_fault(self, label: str) -> str:
        if self.allowed is not None:
            if label in self.allowed:
                return ""
            expected = f"allowed: {listed(list(self.allowed))}"
            if len(self.here.faults) < _SHOWN_FAULTS:  # a million of these must not cost a million searches
                expected = near_miss(label, list(self.allowed)) + expected
        elif self.regression:
            if _number(label) is not None:
                return ""
            point = label.replace(",", ".")
            hint = f"did you mean {show(point)}? " if "," in label and _number(point) is not None else ""
            expected = f"{hint}problem_type: regression takes numbers up to 1e18"
        elif label:
            return ""
        else:
            expected = "a label is expected"
        if not label:
            return f"label_column {self.columns.label!r} is empty; {expected}"
        is_first = not self.columns.has_header and self.here.num_rows == 1
        hint = "; if this row is a header, set --has_header true or remove it" if is_first else ""
        return f"{'label' if self.regression else 'unknown label'} {show(label)}; {expected}{hint}"

    def warn_of_headers(self) -> None:
        """Point out headers that may be rows, and first rows that may be headers."""
        counts = Counter(self.labels)
        for where, label, number in self.headers:
            found = "" if number is None else f"it holds {number}"
            if label and (label in counts or (self.regression and _number(label) is not None)):
                found = f"its label column holds {show(label)}"
            if found:
                advice = "if it is one, set has_header: false"
                logger.warning("%sread as the header, but %s like a row; %s", where, found, advice)
        lone = [label for label, count in counts.items() if count == 1]
        if self.allowed is not None or self.regression or len(lone) != 1:
            return
        for where, row in self.first_rows:
            if self.labels[row] == lone[0]:
                advice = "if it is a header, set has_header: true"
                logger.warning("%sno other row has its label, %s; %s", where, show(lone[0]), advice)


def _used(cells: list[str], places: Places) -> list[str]:
    """The cells that are read."""
    return [cells[place].strip() for place in places[:3] if place is not None]


def _number(text: str) -> float | None:
    """The number that the text is, or None where it is none or its square is no float32."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if abs(number) <= _LARGEST and "_" not in text else None
