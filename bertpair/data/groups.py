"""What group each row belongs to, such as its question or its language: the text in one more column."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from bertpair.data.columns import Columns, Places, locate_columns
from bertpair.data.dataset import Pairs
from bertpair.data.records import first_row, is_blank, read_records
from bertpair.errors import DataError, list_faults


def has_column(paths: Sequence[Path], columns: Columns, column: str | int | None) -> bool:
    """Whether all these files have it."""
    if column is None:
        return False
    wanted = dataclasses.replace(columns, text_a=column, text_b=None, label=None)
    try:
        for path in paths:
            locate_columns(wanted, first_row(path, columns.quoting), "")
    except DataError:
        return False
    return True


def read_groups(pairs: Pairs, columns: Columns, column: str | int) -> list[str]:
    """The text of each row in a column of its file, in the order of the rows; DataError where there is none.

    `columns` are those that the rows were read with.
    """
    columns = dataclasses.replace(columns, text_a=column, text_b=None, label=None, header=pairs.header)
    groups: list[str] = []
    faults: list[str] = []
    for number, path in enumerate(pairs.files):
        lines = set(pairs.line_of_row[pairs.file_of_row == number].tolist())
        places: Places | None = None
        for line, cells, _ in read_records(path, columns.quoting):
            if places is None and cells:
                try:
                    places = locate_columns(columns, cells, f"{path}:{line}: ")
                except DataError as error:
                    raise DataError(str(error).replace("text_a_column", "group_column")) from None
            if places is not None and line in lines:
                groups.append(cells[places.text_a] if places.text_a < len(cells) else "")
                if is_blank(groups[-1]):
                    faults.append(f"{path}:{line}: group_column {column!r} is empty; a text is expected")
    if faults:
        raise DataError(list_faults(faults))
    return groups
