"""Files of rows → pairs of texts and their labels, whole or in windows; every fault with its file and line.

Texts come back verbatim, labels without surrounding spaces. Every row that cannot be used is named; none is
dropped unless `on_bad_row: skip` asks for it, and then it is counted and listed. `labels`: another label is a
bad row; with `regression`, one that is not a finite number.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from bertpair.data.columns import Columns
from bertpair.data.dataset import Pairs
from bertpair.data.lines import STDIN, has_stdin, name_of
from bertpair.data.reader import Reader
from bertpair.errors import DataError

_COUNTED_ROWS = 8192  # held at a time by a count


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

    `on_bad_row`: `error` raises a DataError with the first ten faults, `skip` leaves bad rows out, counts
    and lists them; a file that cannot be read, or has no good row, is an error in both. `limit`: the most
    good rows to read.
    """
    _refuse_standard_input(paths)
    reader = Reader(columns, _allowed(labels, regression), regression, limit, skips=on_bad_row == "skip")
    for _ in reader.read(paths):
        pass
    pairs = reader.take()
    reader.conclude()
    return pairs


def count_rows(
    paths: Sequence[Path | str],
    columns: Columns,
    *,
    labels: Sequence[str] | None = None,
    regression: bool = False,
    on_bad_row: str = "error",
    limit: int | None = None,
) -> int:
    """How many rows `read_pairs` would give; it says and raises the same, and holds few of them at a time."""
    _refuse_standard_input(paths)
    allowed, skips = _allowed(labels, regression), on_bad_row == "skip"
    reader = Reader(columns, allowed, regression, limit, skips, window_rows=_COUNTED_ROWS)
    for _ in reader.read(paths):
        reader.drop()
    reader.drop()
    reader.conclude()
    return reader.num_good


def read_windows(
    paths: Sequence[Path | str],
    columns: Columns,
    *,
    window_rows: int,
    labels: Sequence[str] | None = None,
    regression: bool = False,
    on_bad_row: str = "error",
    limit: int | None = None,
    is_checked: bool = False,
) -> Iterator[Pairs]:
    """The rows of `read_pairs`, `window_rows` good ones at a time, the last ones perhaps fewer.

    Each file is read once, and no further than to the `limit`; `-` is the standard input. What is wrong with
    a row or a file is a DataError in place of the window it falls into. `is_checked`: `count_rows` has read
    these files, so that no warning is to be said again.
    """
    allowed, skips = _allowed(labels, regression), on_bad_row == "skip"
    reader = Reader(
        columns, allowed, regression, limit, skips, window_rows, stops=True, is_checked=is_checked
    )
    for _ in reader.read(paths):
        reader.raise_faults()
        yield reader.take()
    last = reader.take()
    reader.conclude()
    if len(last):
        yield last


def _allowed(labels: Sequence[str] | None, regression: bool) -> dict[str, None] | None:
    return None if labels is None or regression else dict.fromkeys(labels)


def _refuse_standard_input(paths: Sequence[Path | str]) -> None:
    if has_stdin(paths):
        raise DataError(f"{name_of(STDIN)}: can be read only once, and not for this; save it as a file")
