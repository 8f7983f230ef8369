"""Rows of several files → texts, labels and what else is read of them; every fault with its file and line.

The rows that were read are held until somebody takes them: all at once, or a window of them at a time. What
else stays does not grow with the rows, so that a file may be larger than the memory.
"""

import logging
import os
import re
import sys
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
    near_miss,
    said,
)
from bertpair.data.dataset import Pairs
from bertpair.data.lines import name_of
from bertpair.data.open_file import SHOWN_FAULTS, OpenFile, check_delimiter, odd_fault, used_cells
from bertpair.data.records import Record, is_blank, read_records
from bertpair.errors import DataError, list_faults, listed, show

logger = logging.getLogger(__name__)

_MANY_LABELS = 100_000  # beyond which they are not counted
_LARGEST = 1e18  # its square, of which the loss is made, is still a float32


@dataclass
class Reader:
    """Collects rows over all files.

    `allowed`: the labels that may be; `limit`: the most good rows to read; `skips`: whether bad rows are left
    out rather than faults; `window_rows`: how many rows it holds at most; `stops`: whether it is done at the
    limit rather than count the rows beyond it; `is_checked`: whether all that is to be said was said before.
    """

    columns: Columns
    allowed: dict[str, None] | None
    regression: bool
    limit: int | None
    skips: bool
    window_rows: int = sys.maxsize
    stops: bool = False
    is_checked: bool = False
    num_good: int = 0
    header: tuple[str, ...] | None = None
    names_beside: list[tuple[str, str]] = field(default_factory=list)  # settings, names in the first file
    files: list[OpenFile] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)  # what is wrong with whole files
    headers: list[tuple[str, str, str | None]] = field(default_factory=list)  # where, label's cell, a number
    first_rows: list[tuple[str, str]] = field(default_factory=list)  # of files without a header: where, label
    counts: Counter[str] = field(default_factory=Counter)  # of the labels in rows taken
    are_quoted: bool = True  # the texts in rows taken

    def __post_init__(self) -> None:
        self.most = sys.maxsize if self.limit is None else self.limit
        self._hold_nothing()

    def _hold_nothing(self) -> None:
        self.text_a: list[str] = []
        self.text_b: list[str] = []
        self.labels: list[str] = []
        self.groups: list[str] = []
        self.kept: list[list[str]] = [[] for _ in self.columns.kept]
        self.line_of_row: list[int] = []
        self.room = min(self.window_rows, self.most - self.num_good)  # until they are to be taken

    @property
    def is_full(self) -> bool:
        return self.num_good >= self.most

    def read(self, paths: Sequence[Path | str]) -> Iterator[None]:
        """Go through all files, and pause when a window is full: `take` or `drop` it then.

        A file that cannot be read does not keep the others from it: `raise_faults` says what is wrong.
        """
        for path in paths:
            if self.stops and self.is_full:
                return
            form = self.columns.format_of(path)
            columns = replace(self.columns, has_header=self.columns.has_header or form.has_names)
            here = OpenFile(name_of(os.fspath(path)), form, columns, len(self.text_a))
            self.files.append(here)
            try:
                yield from self._read_file(here, read_records(os.fspath(path), form))
            except DataError as error:
                self.broken.append(str(error))
                here.note(str(error))
                here.is_read = True

    def take(self) -> Pairs:
        """The rows held, which then are held no more."""
        columns, starts = self.columns, [*(file.start for file in self.files), len(self.text_a)]
        names = [name for setting, name in self.names_beside if setting == "keep_columns"]
        pairs = Pairs(
            self.text_a,
            None if columns.text_b is None else self.text_b,
            None if columns.label is None else self.labels,
            tuple(file.path for file in self.files),
            np.repeat(np.arange(len(self.files), dtype=np.int32), np.diff(starts)),
            np.array(self.line_of_row, dtype=np.int32),
            self.header,
            None if columns.group is None else self.groups,
            dict(zip(names, self.kept, strict=False)) if columns.kept else None,
        )
        self.drop()
        return pairs

    def drop(self) -> None:
        """Hold them no more."""
        if not self.regression and len(self.counts) <= _MANY_LABELS:
            self.counts.update(self.labels)
        self.are_quoted = self.are_quoted and all(map(is_quoted, self.text_a))
        for file in self.files:
            file.start = 0
        self._hold_nothing()

    def raise_faults(self) -> None:
        """DataError with what is wrong so far: bad rows unless they are skipped, and broken files."""
        here = self.files[-1] if self.files else None
        if here is not None and not here.is_read and not self.skips:
            here.check_shape()
            if here.first is not None and here.starts_well:
                here.first.check_early(f"{here.path}:{here.first.line}: ", here.columns)
        if (all_faults := self._all_faults()) and not self.skips:
            raise DataError(all_faults)
        if self.broken:
            raise DataError(list_faults(self.broken, limit=SHOWN_FAULTS))

    def _all_faults(self) -> str:
        faults = [fault for file in self.files for fault in file.faults]
        return list_faults(faults, sum(file.num_faults for file in self.files), SHOWN_FAULTS)

    def conclude(self) -> None:
        """What is said at the end, once all rows are taken; DataError as `raise_faults`."""
        self.raise_faults()
        if self.is_checked:
            return
        names = ", ".join(file.path for file in self.files)
        num_rows = sum(file.num_rows for file in self.files)
        if num_rows > self.num_good and self.is_full and not self.stops:
            logger.info("%s: only the first %s", names, f"{self.limit:,} of {num_rows:,} rows")
        if all_faults := self._all_faults():
            num_faults = sum(file.num_faults for file in self.files)
            logger.warning("bad rows skipped: %d (on_bad_row: skip)\n%s", num_faults, all_faults)
        self._warn_of_headers()
        is_plain = not any(file.form.has_quotes or file.form.has_names for file in self.files)
        if is_plain and self.num_good > 1 and self.are_quoted:
            logger.warning("%s: all texts are in quotes; --quoting csv takes them off", names)

    def _read_file(self, here: OpenFile, records: Iterator[Record]) -> Iterator[None]:
        """All rows of one file, or as many as the limit wants; DataError if there is nothing to read."""
        for record in records:
            stop_flag.raise_if_set()
            if not record.cells:
                here.note_empty(record.line)
                continue
            if here.places is None:
                here.places = self._start(here, record, records)
                if here.columns.has_header:
                    continue
            if here.first is None:
                here.first = FirstRow(record.line, record.cells, here.places, self.allowed or ())
            else:
                here.first.compare(record.cells)
            if here.num_empty:
                here.count_empty(here.places.needed)
            here.num_rows += 1
            if self.num_good < self.most:
                self._add(record, here, here.places)
                if not self.room:
                    yield
                    if self.stops and self.is_full:
                        break
        self._close(here)

    def _start(self, here: OpenFile, record: Record, records: Iterator[Record]) -> Places:
        """Find the columns in a file's first row, which is its header if it has one."""
        cells, columns, form = record.cells, here.columns, here.form
        where = f"{here.path}:{record.line}: "
        if columns.has_header and (record.fault or (here.num_empty and not form.has_names)):
            raise DataError(
                where + (record.fault or "the header row is expected in the first line, not after empty ones")
            )
        if not form.has_names:
            check_delimiter(where, cells, columns, form, records)
        here.num_filled = max((place + 1 for place, cell in enumerate(cells) if cell.strip()), default=0)
        if columns.has_header:
            check_header(where, cells, form)
        places = locate_columns(columns, cells, where)
        self._name_beside(where, cells, places, columns)
        if columns.has_header:
            self._take_header(where, cells, places, here)
        return places

    def _take_header(self, where: str, cells: list[str], places: Places, here: OpenFile) -> None:
        number = None
        if self.header is None:
            self.header = tuple(cell.strip() for cell in cells)
        if self.columns.header is None:  # further files must agree with this one
            self.columns = replace(self.columns, header=self.header)
            number = next((cell for cell in cells if re.fullmatch("[+-]?[0-9]+", cell)), None)
        if not here.form.has_names:
            here.header, here.leading = used_cells(cells, places), places.texts[0]
            label = "" if places.label is None else cells[places.label].strip()
            self.headers.append((where, label, number))

    def _name_beside(self, where: str, cells: list[str], places: Places, columns: Columns) -> None:
        """Names for the columns that come along; DataError where those of the first file are others."""
        names: list[tuple[str, str]] = []
        for (setting, column), place in zip(columns.beside(), places.beside, strict=True):
            name = cells[place].strip() if columns.has_header else ""
            is_usable = name and (setting, name) not in names
            names.append((setting, name if is_usable else f"column {column}"))
        self.names_beside = self.names_beside or names
        pairs = zip(columns.beside(), names, self.names_beside, strict=True)
        for (setting, column), (_, name), (_, first) in pairs:
            if name.casefold() != first.casefold():
                there = f"{show(first)} in {self.files[0].path}"
                raise DataError(f"{where}{setting} {column!r} is {show(name)} here, and {there}")

    def _close(self, here: OpenFile) -> None:
        """What a whole file shows; DataError where that leaves nothing to be read from it."""
        here.is_read, first = True, here.first
        if here.places is None or first is None:
            raise DataError(
                f"{here.path}: " + ("only a header row, no rows" if here.places else "the file is empty")
            )
        here.check_shape()
        if self.skips and here.num_tried and here.good is None:
            faults = list_faults(here.faults, here.num_faults)
            raise DataError(f"{here.path}: not one good row:\n{faults}")
        if self.is_checked:
            return
        if here.starts_well and here.good and not here.form.has_names:
            self._check_first(here, here.good, first, here.places)
        if here.num_short:
            said_of_short = (
                "%s: rows with fewer columns than the first, counted from the left: %d, as in line %d"
            )
            logger.warning(said_of_short, here.path, here.num_short, here.first_short)

    def _check_first(self, here: OpenFile, row: Record, first: FirstRow, places: Places) -> None:
        """Whether the first row is a header; a note of it where it is read as a row."""
        where = f"{here.path}:{first.line}: "
        if not first.check(where, here.columns) or here.columns.has_header:
            return
        if places.label is not None:
            self.first_rows.append((where, row.cells[places.label].strip()))
            return
        texts = [text for text in self._texts(row.cells, places) if text is not None]
        logger.info("%sread as a row, not as a header: %s", where, listed(texts))

    def _add(self, record: Record, here: OpenFile, places: Places) -> None:
        cells, fault, text_a, text_b = record.cells, record.fault, "", None
        here.num_tried += 1
        if not fault and len(cells) != places.width:
            fault = here.shape_fault(cells, places)
        if not fault:
            text_a, text_b = self._texts(cells, places)
            fault = self._fault(record, text_a, text_b, here, places)
        if fault:
            here.note(f"{here.path}:{record.line}: {fault}")
            self.room -= not self.skips  # a window with bad rows has an end too
            return
        if len(cells) < here.num_filled:
            here.first_short = here.first_short or record.line
            here.num_short += 1
        here.good = here.good or record
        self.num_good += 1
        self.room -= 1
        self.text_a.append(text_a)
        if text_b is not None:
            self.text_b.append(text_b)
        if places.label is not None:
            self.labels.append(cells[places.label].strip())
        if places.group is not None:
            self.groups.append(cells[places.group])
        if places.kept:
            for place, column in zip(places.kept, self.kept, strict=True):
                column.append(cells[place] if place < len(cells) else "")
        self.line_of_row.append(record.line)

    def _texts(self, cells: list[str], places: Places) -> tuple[str, str | None]:
        """Both texts, each from one or several columns."""
        a, b = places.text_a, places.text_b
        text_a = cells[a] if isinstance(a, int) else self._joined(cells, a)
        if b is None:
            return text_a, None
        return text_a, cells[b] if isinstance(b, int) else self._joined(cells, b)

    def _joined(self, cells: list[str], places: tuple[int, ...]) -> str:
        return self.columns.separator.join(cells[place] for place in places if not is_blank(cells[place]))

    def _fault(self, record: Record, text_a: str, text_b: str | None, here: OpenFile, places: Places) -> str:
        """What is wrong with a row that is text and wide enough, or ""."""
        cells, columns = record.cells, self.columns
        if record.odd and (fault := odd_fault(record, here.columns, places)):
            return fault
        if is_blank(text_a):
            return f"text_a_column {said(columns.text_a)} is empty; a text is expected"
        if text_b is not None and is_blank(text_b):
            return f"text_b_column {said(columns.text_b)} is empty; a text is expected"
        if places.label is not None and (fault := self._label_fault(cells[places.label].strip(), here)):
            return fault
        if places.group is not None and is_blank(cells[places.group]):
            return f"group_column {columns.group!r} is empty; a text is expected"
        header = here.header
        if header and cells[here.leading].strip() == header[0] and used_cells(cells, places) == header:
            return (
                "the header row again; was one file appended to another? "
                "If it is a row, set has_header: false"
            )
        return ""

    def _label_fault(self, label: str, here: OpenFile) -> str:
        if self.allowed is not None:
            if label in self.allowed:
                return ""
            expected = f"allowed: {listed(list(self.allowed))}"
            if len(here.faults) < SHOWN_FAULTS:  # a million of these must not cost a million searches
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
        is_first = not here.columns.has_header and here.num_rows == 1
        hint = "; if this row is a header, set --has_header true or remove it" if is_first else ""
        return f"{'label' if self.regression else 'unknown label'} {show(label)}; {expected}{hint}"

    def _warn_of_headers(self) -> None:
        """Point out headers that may be rows, and first rows that may be headers."""
        for where, label, number in self.headers:
            found = "" if number is None else f"it holds {number}"
            if label and (label in self.counts or (self.regression and _number(label) is not None)):
                found = f"its label column holds {show(label)}"
            if found:
                advice = "if it is one, set has_header: false"
                logger.warning("%sread as the header, but %s like a row; %s", where, found, advice)
        if self.allowed is not None or self.regression or len(self.counts) > _MANY_LABELS:
            return
        lone = [label for label, count in self.counts.items() if count == 1]
        for where, label in self.first_rows if len(lone) == 1 else ():
            if label == lone[0]:
                advice = "if it is a header, set has_header: true"
                logger.warning("%sno other row has its label, %s; %s", where, show(lone[0]), advice)


def _number(text: str) -> float | None:
    """The number that the text is, or None where it is none or its square is no float32."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if abs(number) <= _LARGEST and "_" not in text else None
