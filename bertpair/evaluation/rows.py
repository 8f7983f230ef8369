"""What a caller of `PairClassifier` may give as pairs of texts, and what of it are the texts."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from typing import Any

import numpy as np

from bertpair.errors import DataError, half_character

WINDOW_ROWS = 5_000  # held at a time where rows are read as they come
NAMES = (("text_a", "text_b"), ("sentence1", "sentence2"))  # of the service's routes, the new and the old
_SINGLE = "this model takes pairs of texts, found single texts"
_PAIRS = "this model takes single texts, found pairs of texts"
_EXPECTED_NAMES = "text_a and text_b, or sentence1 and sentence2 (the first alone for a single text)"

Pairs = Iterable[Any]  # (text_a, text_b) each, or single texts, or mappings with `NAMES`; or a table


def as_rows(pairs: Pairs, takes_pairs: bool | None) -> list[Any]:
    """What a caller gave as a list of rows: each a text, two texts, or a mapping with the service's names.

    One pair alone is one row: two texts given to a model of pairs, or, where `takes_pairs` is not known, a
    tuple of two texts. Raises DataError for what holds no rows.
    """
    if hasattr(pairs, "columns"):  # a data frame
        return _rows_of_table(pairs, list(pairs.columns), takes_pairs)
    is_one_value = isinstance(pairs, np.ndarray) and not pairs.ndim
    if isinstance(pairs, str | bytes) or is_one_value or not isinstance(pairs, Iterable):
        raise DataError(f"pairs: found {pairs!r:.60}; expected a list of pairs, or of single texts")
    if isinstance(pairs, Mapping):
        is_row = any(isinstance(pairs.get(name), str) for names in NAMES for name in names)
        has_columns = any(isinstance(value, Iterable) for value in pairs.values())
        return [pairs] if is_row or not has_columns else _rows_of_table(pairs, list(pairs), takes_pairs)
    rows = list(pairs)
    is_bare = takes_pairs or (takes_pairs is None and isinstance(pairs, tuple))
    return [rows] if is_bare and len(rows) == 2 and all(isinstance(row, str) for row in rows) else rows


def row_windows(pairs: Pairs, takes_pairs: bool | None, window_rows: int) -> Iterator[list[Any]]:
    """The rows in order, `window_rows` in a list, the last list shorter; each is read when it is asked for.

    What is no stream of rows (one pair alone, a mapping, a table) is read at once, by `as_rows`.
    """
    rows = iter(pairs if _is_stream(pairs) else as_rows(pairs, takes_pairs))
    return iter(lambda: list(islice(rows, window_rows)), [])


def _is_stream(pairs: Pairs) -> bool:
    """Whether each item is a row for certain: two items in a list may be the texts of one pair."""
    if hasattr(pairs, "columns") or isinstance(pairs, str | bytes | Mapping | np.ndarray):
        return False
    return isinstance(pairs, Iterable) and not (isinstance(pairs, Sized) and len(pairs) == 2)


def _rows_of_table(table: Any, columns: Sequence[Any], takes_pairs: bool | None) -> list[Any]:
    """The columns by the service's names; other names only where the table has nothing but the texts."""
    names = next((names for names in NAMES if names[0] in columns), None)
    found = [name for name in names or columns if name in columns and table[name] is not None]
    said = ", ".join(map(str, columns))
    if (names is None and len(columns) > 2) or not found:
        raise DataError(f"pairs: found a table with the columns {said}; expected {_EXPECTED_NAMES}")
    if names is not None and takes_pairs and len(found) < 2:
        raise DataError(f"pairs: {_SINGLE}; {names[1]} is missing (found the columns {said})")
    for name in found:
        if columns.count(name) > 1 or isinstance(table[name], str) or not isinstance(table[name], Iterable):
            raise DataError(f"pairs: expected one column {name} with a text for each row")
    texts = [list(table[name]) for name in found]
    if len({*map(len, texts)}) > 1:
        counts = ", ".join(f"{name} has {len(column)}" for name, column in zip(found, texts, strict=True))
        raise DataError(f"pairs: expected columns with equally many rows; {counts}")
    return texts[0] if len(texts) == 1 else list(zip(*texts, strict=True))


def split_pairs(
    rows: Sequence[Any], takes_pairs: bool | None = None, first: int = 0
) -> tuple[list[str], list[str] | None]:
    """Rows as two columns; the second is None for single texts. Faults count the rows from `first` on.

    Raises DataError naming the row that is not what the model takes (where `takes_pairs` is None: not what
    the first row is) or holds something that is not a text.
    """
    found = [_texts_of(number, row, takes_pairs) for number, row in enumerate(rows, first)]
    expected = 1 + takes_pairs if takes_pairs is not None else len(found[0]) if found else 2
    for number, texts in enumerate(found):
        if len(texts) == expected:
            continue
        if takes_pairs is not None:
            raise DataError(f"pairs[{first + number}]: {_SINGLE if takes_pairs else _PAIRS}")
        kind = "a single text" if expected == 1 else "two texts"
        row = rows[number]
        raise DataError(f"pairs[{first + number}]: expected {kind} like the first row, found {row!r:.80}")
    return [texts[0] for texts in found], None if expected == 1 else [texts[1] for texts in found]


def _texts_of(number: int, row: Any, takes_pairs: bool | None) -> list[str]:
    """The one or two texts of a row."""
    if isinstance(row, str):
        return [row]
    if isinstance(row, Mapping):
        names = next((names for names in NAMES if names[0] in row), None)
        keys = ", ".join(map(str, row)) or "none"
        if names is None:
            raise DataError(f"pairs[{number}]: found the keys {keys}; expected {_EXPECTED_NAMES}")
        texts = [row[name] for name in names if row.get(name) is not None]
        if takes_pairs and len(texts) < 2:
            raise DataError(f"pairs[{number}]: {_SINGLE}; {names[1]} is missing (found the keys {keys})")
    else:
        texts = list(row) if isinstance(row, list | tuple | np.ndarray) else []
    if not 1 <= len(texts) <= 2 or (len(texts) == 1 and not isinstance(row, Mapping)):
        raise DataError(f"pairs[{number}]: expected two texts, found {row!r:.80}")
    for text in texts:
        if not isinstance(text, str):
            raise DataError(f"pairs[{number}]: expected texts, found {text!r:.80} ({type(text).__name__})")
        if (at := half_character(text)) is not None:
            raise DataError(f"pairs[{number}]: character {at} is {text[at]!r}, half of a surrogate pair")
    return texts
