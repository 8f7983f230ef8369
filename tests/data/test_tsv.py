"""Rows → texts and labels: what is kept verbatim, and how each bad row is named."""

import csv
import logging
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bertpair.console import stop_flag
from bertpair.data.columns import Columns
from bertpair.data.dataset import Pairs
from bertpair.data.formats import QUOTED_TSV
from bertpair.data.records import first_row
from bertpair.data.tsv import read_pairs
from bertpair.errors import DataError, StoppedError

FAST = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FOUR = Columns(1, 2, 3)
HEADER = "index\tsentence1\tsentence2\tlabel\n"
SENTIMENT = ("negative", "neutral", "positive")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(content: str | bytes, name: str = "train.tsv") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def faults(path: Path, columns: Columns = FOUR, **options: object) -> list[str]:
    """The lines of the DataError, without the folder."""
    with pytest.raises(DataError) as caught:
        read_pairs([path], columns, **options)
    return str(caught.value).replace(f"{path.parent}/", "").splitlines()


def test_texts_are_verbatim_and_labels_stripped(write: Callable[..., Path]) -> None:
    path = write(HEADER + '0\t a "b \t\u3000c\u2028d\x85\t positive \r\n1\té\tz\x0bz\tneutral')
    pairs = read_pairs([path], FOUR, labels=SENTIMENT)
    assert (pairs.text_a, pairs.text_b) == ([' a "b ', "é"], ["\u3000c\u2028d\x85", "z\x0bz"])
    assert pairs.labels == ["positive", "neutral"]
    assert len(pairs) == 2
    assert [pairs.where(row) for row in range(2)] == [f"{path}:2", f"{path}:3"]


def test_single_texts_and_files_without_labels(write: Callable[..., Path]) -> None:
    pairs = read_pairs([write("0\tyes\n1\tno\n")], Columns(1, None, None, has_header=False))
    assert (pairs.text_a, pairs.text_b, pairs.labels) == (["yes", "no"], None, None)


def test_several_files_are_read_in_order_each_with_its_own_header(write: Callable[..., Path]) -> None:
    one = write("q\ta\tgrade\nq1\ta1\tx\n\n", "one.tsv")
    two = write("grade\tnote\ta\tq\ny\t-\ta2\tq2\nx\t-\ta3\tq3\n", "two.tsv")
    pairs = read_pairs([one, str(two)], Columns("q", "a", "grade"))
    assert (pairs.text_a, pairs.text_b, pairs.labels) == (
        ["q1", "q2", "q3"],
        ["a1", "a2", "a3"],
        ["x", "y", "x"],
    )
    assert pairs.files == (str(one), str(two)) and pairs.file_of_row.tolist() == [0, 1, 1]
    assert pairs.line_of_row.tolist() == [2, 2, 3] and pairs.where(2) == f"{two}:3"


def test_quoting_csv_keeps_tabs_and_newlines_and_counts_lines(write: Callable[..., Path]) -> None:
    path = write(HEADER + '0\t"a\tb\nc"\t"say ""x"""\tp\n1\td\te\tq\n')
    pairs = read_pairs([path], Columns(1, 2, 3, quoting="csv"))
    assert (pairs.text_a, pairs.text_b) == (["a\tb\nc", "d"], ['say "x"', "e"])
    assert pairs.line_of_row.tolist() == [2, 4]


BAD_ROWS = {
    "7\ta\n": "expected at least 4 tab-separated columns, found 2",
    "7\ta\tb\tc\tpositive\n": "expected 4 tab-separated columns as in the first row, found 5; is there a tab",
    "7\t \tb\tpositive\n": "text_a_column 1 is empty; a text is expected",
    "7\ta\t\tpositive\n": "text_b_column 2 is empty; a text is expected",
    "7\ta\tb\t \n": "label_column 3 is empty; allowed: 'negative', 'neutral', 'positive'",
    "7\ta\tb\tPositiv\n": "unknown label 'Positiv'; did you mean 'positive'? allowed: 'negative', 'neutral',",
    "\n": "an empty line; expected at least 4 columns",
    "7\ta\0\tb\tpositive\n": "byte 4 of the line is NUL",
}


@pytest.mark.parametrize("row", BAD_ROWS)
def test_a_bad_row_is_named_with_what_was_found(
    write: Callable[..., Path], row: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(HEADER + "0\ta\tb\tneutral\n" + row + "2\ta\tb\tneutral\n" * 2)
    (fault,) = faults(path, labels=SENTIMENT)
    assert fault.startswith(f"train.tsv:3: {BAD_ROWS[row]}")
    pairs = read_pairs([path], FOUR, labels=SENTIMENT, on_bad_row="skip")
    assert pairs.line_of_row.tolist() == [2, 4, 5] and "bad rows skipped: 1 (on_bad_row" in caplog.text


def test_undecodable_bytes_are_named(write: Callable[..., Path]) -> None:
    assert faults(write(HEADER.encode() + "0\té".encode() + b"\xb0\tb\tc\n")) == [
        "train.tsv:2: byte 5 of the line, 0xb0, is not UTF-8"
    ]


def test_cells_beyond_the_header_are_harmless_when_empty(write: Callable[..., Path]) -> None:
    assert read_pairs([write(HEADER + "0\ta\tb\tc\t\t \n")], Columns(1, 2, -1)).labels == ["c"]


def test_ten_faults_are_listed_and_the_rest_counted(write: Callable[..., Path]) -> None:
    found = faults(write(HEADER + "0\ta\n" * 25), labels=SENTIMENT)
    assert len(found) == 11 and found[9].startswith("train.tsv:11: ") and found[10] == "… and 15 more"


def test_skipped_rows_are_counted_and_listed(
    write: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        pairs = read_pairs([write(HEADER + "0\ta\tb\tx\n" + "1\n" * 12)], FOUR, on_bad_row="skip")
    assert len(pairs) == 1
    assert "bad rows skipped: 12" in caplog.text and "train.tsv:3: expected at least 4" in caplog.text
    assert "… and 2 more" in caplog.text


def test_a_file_that_cannot_be_read_is_an_error_even_when_bad_rows_are_skipped(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    paths = [write(HEADER + "0\ta\tb\tx\n1\n"), tmp_path / "absent.tsv", write("", "empty.tsv")]
    with pytest.raises(DataError) as caught:
        read_pairs(paths, FOUR, on_bad_row="skip")
    assert [line.rsplit("/", 1)[1] for line in str(caught.value).splitlines()] == [
        "absent.tsv: no such file",
        "empty.tsv: the file is empty",
    ]
    with pytest.raises(DataError, match="(?s)not one good row.*train.tsv:2: expected at least"):
        read_pairs([write(HEADER + "0\n")], FOUR, on_bad_row="skip")


@pytest.mark.parametrize(
    "content, fault",
    [
        ("", "train.tsv: the file is empty"),
        ("\n \n", "train.tsv: the file is empty"),
        (HEADER, "train.tsv: only a header row, no rows"),
        (HEADER + "\n\t\n", "train.tsv: only a header row, no rows"),
        ("\n" + HEADER, "train.tsv:2: the header row is expected in the first line, not after empty ones"),
        ("a\0\tb\n0\ta\tb\tc\n", "train.tsv:1: byte 2 of the line is NUL; text is expected"),
        ("q\ta\n", "train.tsv:1: text_b_column 2 does not exist: the first row has 2 columns"),
    ],
)
def test_files_without_rows_or_header(write: Callable[..., Path], content: str, fault: str) -> None:
    assert faults(write(content))[0].startswith(fault)


def test_empty_lines_at_the_end_are_harmless(write: Callable[..., Path]) -> None:
    assert len(read_pairs([write(HEADER + "0\ta\tb\tx\n\n\t\t\t\n\r\n")], FOUR)) == 1


def test_regression_takes_finite_numbers_only(write: Callable[..., Path]) -> None:
    good = ["5", "-0.5", "1e-3", " 2.50 "]
    rows = "".join(f"0\ta\tb\t{label}\n" for label in good)
    assert read_pairs([write(HEADER + rows)], FOUR, regression=True).labels == [
        label.strip() for label in good
    ]
    for bad in ["nan", "inf", "-Infinity", "1e39", "-1e30", "3,5", "1_0", "five", ""]:
        (fault,) = faults(write(HEADER + f"0\ta\tb\t{bad}\n"), regression=True)
        assert fault.startswith("train.tsv:2: label") and fault.endswith("takes numbers up to 1e18")


def test_the_limit_counts_good_rows_over_all_files_and_says_of_how_many(
    write: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    one = write(HEADER + "0\ta\tb\tx\n1\n2\tc\td\ty\n", "one.tsv")
    two = write(HEADER + "0\te\tf\tx\n1\n", "two.tsv")
    paths = [one, two]
    with caplog.at_level("INFO", "bertpair"):
        pairs = read_pairs(paths, FOUR, on_bad_row="skip", limit=3)
    assert f"{one}, {two}: only the first 3 of 5 rows" in caplog.text
    assert pairs.text_a == ["a", "c", "e"] and "bad rows skipped: 1 (" in caplog.text
    assert read_pairs(paths, FOUR, limit=1).text_a == ["a"]


def test_a_header_that_looks_like_a_row_is_pointed_out(
    write: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    for columns, options in ((FOUR, {}), (FOUR, {"regression": True})):
        caplog.clear()
        read_pairs([write("0\ta\tb\t1\n1\tc\td\t0\n2\te\tf\t1\n")], columns, **options)
        assert "train.tsv:1: read as the header" in caplog.text and "has_header: false" in caplog.text
    caplog.clear()
    read_pairs([write(HEADER + "0\ta\tb\t1\n")], FOUR)
    assert caplog.text == ""


def test_a_stop_request_ends_the_reading(write: Callable[..., Path]) -> None:
    path = write(HEADER + "0\ta\tb\tx\n")
    stop_flag.request(signal.SIGTERM)
    try:
        with pytest.raises(StoppedError):
            read_pairs([path], FOUR)
    finally:
        stop_flag.clear()


def test_the_first_row_is_that_of_the_file(write: Callable[..., Path]) -> None:
    assert first_row(write("\ufeffa b\t\tc\r\nx\n")) == ["a b", "", "c"]
    assert first_row(write('"a\tb"\tc\n'), QUOTED_TSV) == ["a\tb", "c"]
    for content in ("", "\nx\n", b"\xff\n"):
        with pytest.raises(DataError, match="train.tsv"):
            first_row(write(content))


def check(pairs: Pairs) -> None:
    assert len(pairs) == len(pairs.text_b or []) == len(pairs.labels or []) == len(pairs.line_of_row) > 0
    for text in (*pairs.text_a, *(pairs.text_b or []), *(pairs.labels or [])):
        assert text.strip() and "\0" not in text and text.encode("utf-8")


PIECES = st.sampled_from(
    [b"\t", b"\n", b"\r\n", b'"', b"a", b"\xc3\xa9", b"\xff", b"\0", b"1", b"\xe2\x80\xa8", b" "]
)


@FAST
@given(
    st.one_of(st.binary(max_size=60), st.lists(PIECES, max_size=40).map(b"".join)),
    st.booleans(),
    st.sampled_from(["none", "csv"]),
    st.sampled_from(["error", "skip"]),
    st.sampled_from([-1, 2]),
)
def test_arbitrary_bytes_are_pairs_or_a_data_error(
    write: Callable[..., Path], content: bytes, has_header: bool, quoting: str, on_bad_row: str, label: int
) -> None:
    path = write(content)
    try:
        check(read_pairs([path], Columns(0, 1, label, has_header, quoting), on_bad_row=on_bad_row))
    except DataError as error:
        assert "train.tsv" in str(error)


line_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\t\n\r"), max_size=9).map(
    "x{}".format
)


@FAST
@given(st.lists(st.tuples(line_text, line_text, st.sampled_from(["a", "b "])), min_size=1, max_size=6))
def test_random_rows_come_back_as_they_were(
    write: Callable[..., Path], rows: list[tuple[str, str, str]]
) -> None:
    path = write("".join("\t".join(row) + "\n" for row in rows))
    pairs = read_pairs([path], Columns(0, 1, 2, has_header=False))
    assert list(zip(pairs.text_a, pairs.text_b or [], strict=True)) == [row[:2] for row in rows]
    assert pairs.labels == [row[2].strip() for row in rows]


def test_a_large_random_file_reads_as_the_csv_module_reads_it(tmp_path: Path) -> None:
    rng = random.Random(5)
    alphabet = ["词", "a", " ", '"', "é", "\u2028", "\x1d", "''"]
    rows = [
        [
            str(i),
            *("x" + "".join(rng.choices(alphabet, k=rng.randint(0, 30))) for _ in range(2)),
            rng.choice("ab"),
        ]
        for i in range(5000)
    ]
    path = tmp_path / "large.tsv"
    path.write_bytes("\n".join("\t".join(row) for row in rows).encode())
    with open(path, encoding="utf-8", newline="") as file:
        expected = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    pairs = read_pairs([path], Columns(1, 2, 3, has_header=False))
    assert [list(row) for row in zip(pairs.text_a, pairs.text_b or [], pairs.labels or [], strict=True)] == [
        row[1:] for row in expected
    ]


def test_texts_of_a_megabyte_are_read(write: Callable[..., Path]) -> None:
    text = "很长的文本" * 70_000
    pairs = read_pairs([write(HEADER + f"0\t{text}\tb\tx\n" * 6)], FOUR)
    assert len(pairs) == 6 and pairs.text_a[5] == text
