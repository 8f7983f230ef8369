"""Column names and numbers → positions, and what is said when they do not fit."""

import pytest

from bertpair.data.columns import Columns, Places, locate_columns, near_miss
from bertpair.errors import DataError, listed, show

HEADER = ["id", "question", "answer", "grade"]


def test_names_and_numbers_from_either_end_find_their_columns() -> None:
    expected = Places(text_a=1, text_b=2, label=3, needed=4, width=4)
    assert locate_columns(Columns("question", "answer", "grade"), HEADER, "") == expected
    assert locate_columns(Columns(1, 2, -1), HEADER, "") == expected
    assert (
        locate_columns(Columns(" question", -2, "grade "), [" id", "question ", "x", "grade"], "") == expected
    )
    assert locate_columns(Columns(2, None, None), HEADER, "") == Places(2, None, None, 3, 4)


def test_without_a_header_the_first_row_gives_the_width() -> None:
    assert locate_columns(Columns(0, 5, 7, has_header=False), ["a"], "") == Places(0, 5, 7, 8, 8)
    assert locate_columns(Columns(0, 1, 2, has_header=False), HEADER, "") == Places(0, 1, 2, 3, 4)
    assert locate_columns(Columns(0, 1, -1, has_header=False), HEADER, "") == Places(0, 1, 3, 4, 4)


def test_every_column_that_is_missing_is_named_with_the_header_and_a_suggestion() -> None:
    with pytest.raises(DataError) as caught:
        locate_columns(Columns("Qestion", 4, -5), HEADER, "d.tsv:1: ")
    first, second, third = str(caught.value).splitlines()
    assert first == (
        "d.tsv:1: text_a_column 'Qestion' is not in the header; did you mean 'question'? "
        "found: 'id', 'question', 'answer', 'grade'"
    )
    assert second.startswith("d.tsv:1: text_b_column 4 does not exist: the first row has 4 columns")
    assert third.startswith("d.tsv:1: label_column -5 does not exist: ")


def test_a_name_that_stands_twice_is_a_fault_only_where_it_is_used() -> None:
    header = ["text", "text", "label"]
    with pytest.raises(DataError, match="'text' stands 2 times in the header; .* \\(one of 0, 1\\)"):
        locate_columns(Columns("text", None, "label"), header, "")
    assert locate_columns(Columns(0, 1, "label"), header, "").label == 2


def test_two_roles_on_one_column_are_refused() -> None:
    with pytest.raises(
        DataError, match="label_column -1 is the same column as text_b_column; has this file no"
    ):
        locate_columns(Columns(1, 2, -1), HEADER[:3], "")


def test_messages_stay_short_whatever_they_show() -> None:
    assert show("x" * 10**6) == repr("x" * 60 + "…")
    assert listed(["a"] * 3) == "'a', 'a', 'a'" and listed(range(22)).endswith("19 and 2 more")
    assert (
        near_miss("x" * 10**6, ["label"]) == "" and near_miss("LABLE", ["label"]) == "did you mean 'label'? "
    )


def test_a_header_is_the_training_files_whatever_its_case() -> None:
    columns = Columns(1, 2, 3, header=("ID", "Question", "Straße", "Label"))
    for first in (["ID", "Question", "Straße", "Label"], ["id", "QUESTION", "STRASSE", "label"]):
        assert locate_columns(columns, first, "f: ")[:3] == (1, 2, 3)
