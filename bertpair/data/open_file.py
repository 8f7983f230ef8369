"""One file that is being read: how it is written, and what was found in it so far."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from bertpair.data.columns import Columns, FirstRow, Places, misfit_fault, other_format
from bertpair.data.formats import Format
from bertpair.data.records import Record
from bertpair.errors import DataError, listed

SHOWN_FAULTS = 10


@dataclass
class OpenFile:
    """One file, how it is written, and what was found in it so far. `path` is its name in messages."""

    path: str
    form: Format
    columns: Columns  # as they are in this file
    start: int  # where its rows begin among those held
    places: Places | None = None
    header: list[str] | None = None  # the cells that are read, if a row could repeat them
    leading: int = 0  # the place of its first one
    num_filled: int = 0  # cells of the first row, up to the last one with something in it
    first: FirstRow | None = None  # below the header, if there is one
    good: Record | None = None  # the first good row
    num_rows: int = 0  # those beyond the limit too
    num_tried: int = 0  # those within the limit
    num_short: int = 0  # good rows with fewer cells than the first one
    first_short: int = 0
    empty: list[int] = field(default_factory=list)  # lines; faults only if a row follows
    num_empty: int = 0
    misfits: Counter[int] = field(default_factory=Counter)  # rows without the first one's columns, by cells
    misfit: list[str] = field(default_factory=list)  # the first of them
    faults: list[str] = field(default_factory=list)
    num_faults: int = 0
    is_read: bool = False  # as far as it can be

    @property
    def starts_well(self) -> bool:
        """Whether the first row is a good one."""
        return self.good is not None and self.first is not None and self.good.line == self.first.line

    def note(self, fault: str) -> None:
        self.num_faults += 1
        if len(self.faults) < SHOWN_FAULTS:
            self.faults.append(fault)

    def note_empty(self, line: int) -> None:
        self.num_empty += 1
        if len(self.empty) < SHOWN_FAULTS:
            self.empty.append(line)

    def count_empty(self, needed: int) -> None:
        """Empty lines before a row are faults; at the end of a file they are harmless."""
        for line in self.empty:
            self.note(f"{self.path}:{line}: an empty line; expected at least {needed} columns")
        self.num_faults += self.num_empty - len(self.empty)
        self.empty, self.num_empty = [], 0

    def shape_fault(self, cells: list[str], places: Places) -> str:
        """What is wrong with a row that is not as wide as the first one, or ""."""
        is_short, mark = len(cells) < places.needed, self.form.mark
        if not is_short and not any(cell.strip() for cell in cells[places.width :]):
            return ""
        if not is_short or len(cells) == 1 or not self.columns.has_header:
            self.misfit = self.misfit or cells
            self.misfits[len(cells)] += 1
        if is_short:
            return f"expected at least {places.needed} {mark}-separated columns, found {len(cells)}"
        return (
            f"expected {places.width} {mark}-separated columns as in the first row, found {len(cells)}; "
            f"is there a {mark} inside a text?"
        )

    def check_shape(self) -> None:
        """DataError where all rows of a file lack the columns of its first: one line says it for all."""
        num_others = self.num_tried - (self.starts_well and not self.columns.has_header)
        width, count = next(iter(self.misfits.most_common(1)), (0, 0))
        if self.places is not None and num_others > 1 and count == num_others:
            self.faults, self.num_faults = [], 0
            fault = misfit_fault(width, count, self.misfit, self.places, self.columns, self.form)
            raise DataError(f"{self.path}: {fault}")


def check_delimiter(
    where: str, cells: list[str], columns: Columns, form: Format, records: Iterator[Record]
) -> None:
    """DataError for a first row that shows that the file is written in another way."""
    other = other_format(cells, columns, form)
    if not other and not (columns.has_header and len(cells) == 1 and columns.num_used > 1):
        return
    following = next((each.cells for each in records if each.cells), [])
    if other and len(following) < 2:
        raise DataError(f"{where}looks {other}")
    place = "as in the next row" if len(following) > 1 else "between the columns"
    raise DataError(f"{where}expected {form.mark}s {place}, found none in {listed(cells)}")


def odd_fault(record: Record, columns: Columns, places: Places) -> str:
    """What is wrong with the first cell that is read and holds no text, or ""."""
    settings = [*((f"{role}_column", column) for role, column in columns.by_role()), *columns.beside()]
    label = [] if places.label is None else [places.label]
    for (setting, column), place in zip(settings, [*places.texts, *label, *places.beside], strict=True):
        if place in record.odd:
            return f"{setting} {column!r} {record.odd[place]}"
    return ""


def used_cells(cells: list[str], places: Places) -> list[str]:
    """The cells of texts and label."""
    used = [*places.texts, *(() if places.label is None else (places.label,))]
    return [cells[place].strip() for place in used]
