"""A row of ordinary texts is never taken for a header, whatever stands in it."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bertpair.data.columns import Columns
from bertpair.data.tsv import read_pairs
from bertpair.errors import DataError

LABELS = ("right", "wrong")
THREE = Columns(0, 1, None, has_header=False)
WriteTsv = Callable[..., Path]


@pytest.mark.parametrize(
    "rows",
    [
        [("question", "answer"), ("cat", "dog"), ("sun", "moon")],  # pairs of words
        [("question", "answer"), ("the sun is out", "it is the moon")],  # one further row shows nothing
        [("1", "question", "answer"), ("2", "the cat sat", "on a mat"), ("3", "the sun", "the moon")],
        [("7", "text", "title", "class"), ("8", "the cat sat", "on a mat", "x"), ("9", "a b", "c d", "x")],
        [("What is the question", "The answer", "right"), ("a", "b", "wrong"), ("c", "d", "wrong")],
        [("text a b c", "the sentence", "valid"), ("a b", "b", "paid"), ("c d", "d", "solid")],
        [("question", "my answer", "right"), ("a b", "b c", "wrong"), ("c d", "d e", "right")],
        [("a long row of words that is no name of a column", "b", "?"), ("c", "d", "1"), ("e", "f", "2")],
        [("cat", "dog", "?"), ("c", "d", "1"), ("e", "f", "2")],
        [("cat", "dog", ""), ("c", "d", "1"), ("e", "f", "2")],
        [("问题", "答案"), ("猫", "狗"), ("太阳", "月亮")],
        [
            ("数据库的问题", "索引的答案", "right"),
            ("这是一个问题吗", "不是的", "wrong"),
            ("是", "不", "wrong"),
        ],
    ],
)
def test_ordinary_first_rows_are_rows(
    write_tsv: WriteTsv, rows: list[tuple[str, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    first = len(rows[0][0]) == 1 and len(rows[0]) > 2  # a number before the texts
    columns = Columns(1, 2, None, has_header=False) if first else THREE
    assert len(read_pairs([write_tsv("rows.tsv", rows)], columns, labels=LABELS)) == len(rows)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_single_texts_are_headers_only_above_sentences(write_tsv: WriteTsv) -> None:
    single = Columns(0, None, None, has_header=False)
    for names in (("text",), ("sentence", "label"), ("text_a",), ("title", "grade")):
        rows = [("the cat", "x"), ("a good mat", "y")]
        file = write_tsv("rows.tsv", [row[: len(names)] for row in rows], names)
        with pytest.raises(DataError, match="rows.tsv:1: looks like a header"):
            read_pairs([file], single)
    for words in (
        ["text", "cat", "mat"],
        ["answer", "play some music", "turn it off"],
        ["title", "a b", "c d"],
    ):
        assert len(read_pairs([write_tsv("rows.tsv", [(word,) for word in words])], single)) == 3


def test_texts_in_the_same_words_are_rows_where_a_header_is_read_too(write_tsv: WriteTsv) -> None:
    header = ("id", "question", "answer", "grade")
    rows = [("0", "question", "answer", "x"), ("1", "a b", "c d", "y"), ("2", "e f", "g h", "y")]
    assert len(read_pairs([write_tsv("rows.tsv", rows, header)], Columns(1, 2, 3))) == 3


words = st.text("abcdeéß词 .?!-", min_size=1, max_size=30).filter(lambda text: text.strip(" ") != "")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 99), words, words, st.sampled_from(LABELS)), min_size=1, max_size=6))
def test_random_rows_are_rows(write_tsv: WriteTsv, rows: list[tuple[object, ...]]) -> None:
    for layout in (Columns(1, 2, 3, has_header=False), Columns(1, 2, None, has_header=False)):
        try:
            pairs = read_pairs([write_tsv("rows.tsv", rows)], layout, labels=LABELS)
        except DataError as error:
            assert "header" not in str(error)
        else:
            assert len(pairs) == len(rows)
