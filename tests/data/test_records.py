"""Bytes → rows: what ends a line, what a quote does, and bytes that are not text."""

import csv
import io
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bertpair.data import lines
from bertpair.data.formats import QUOTED_TSV, format_of
from bertpair.data.records import read_records
from bertpair.errors import DataError

FAST = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def rows(path: Path, content: bytes, quoting: str = "none") -> list[tuple[int, list[str], str]]:
    path.write_bytes(content)
    return [tuple(record[:3]) for record in read_records(str(path), format_of(path, quoting=quoting))]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rows.tsv"


@pytest.mark.parametrize("quoting", ["none", "csv"])
@pytest.mark.parametrize("odd", ["\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029", "a\rb"])
def test_only_newlines_end_a_line(path: Path, odd: str, quoting: str) -> None:
    assert rows(path, f"1\tx{odd}y\n2\tz\n".encode(), quoting) == [
        (1, ["1", f"x{odd}y"], ""),
        (2, ["2", "z"], ""),
    ]


@pytest.mark.parametrize("quoting", ["none", "csv"])
def test_bom_crlf_and_a_missing_last_newline_leave_no_trace(path: Path, quoting: str) -> None:
    expected = [(1, ["a", "b"], ""), (2, ["c", "d"], "")]
    for content in (b"a\tb\nc\td\n", b"\xef\xbb\xbfa\tb\r\nc\td\r\n", b"a\tb\r\nc\td", b"a\tb\nc\td\r"):
        assert rows(path, content, quoting) == expected


@pytest.mark.parametrize("quoting", ["none", "csv"])
def test_only_one_mark_and_one_carriage_return_are_taken_away(path: Path, quoting: str) -> None:
    content = b"\xef\xbb\xbf\xef\xbb\xbfa\tb\r\r\nc\td\n"
    assert rows(path, content, quoting) == [(1, ["\ufeffa", "b\r"], ""), (2, ["c", "d"], "")]


@pytest.mark.parametrize("quoting", ["none", "csv"])
def test_empty_lines_are_rows_without_cells(path: Path, quoting: str) -> None:
    assert rows(path, b"a\n\n \t\r\nb\n", quoting) == [
        (1, ["a"], ""),
        (2, [], ""),
        (3, [], ""),
        (4, ["b"], ""),
    ]
    assert rows(path, b"", quoting) == rows(path, b"\xef\xbb\xbf", quoting) == []


def test_quotes_are_literal_without_quoting(path: Path) -> None:
    assert rows(path, b'"a\t""b"\n"\n') == [(1, ['"a', '""b"'], ""), (2, ['"'], "")]


def test_quoted_fields_hold_tabs_newlines_and_doubled_quotes(path: Path) -> None:
    content = b'"a\tb"\t"say ""hi"""\tplain\r\n"two\r\nlines\n\n"\tx\n5" disk\t""\n'
    assert rows(path, content, "csv") == [
        (1, ["a\tb", 'say "hi"', "plain"], ""),
        (2, ["two\r\nlines\n\n", "x"], ""),
        (6, ['5" disk', ""], ""),
    ]


def test_an_unclosed_quote_names_the_line_where_it_opened(path: Path) -> None:
    content = 'h\n"fine\nhere"\tx\t"opened\n' + "more\n" * 9
    with pytest.raises(DataError, match="rows.tsv:3: the quote opened here is never closed"):
        rows(path, content.encode(), "csv")


def test_text_behind_a_closing_quote_is_a_fault_of_its_row_only(path: Path) -> None:
    (_, cells, fault), after = rows(path, b'"a" b\tc\nd\n', "csv")
    assert "text after a closing quote" in fault and cells == ["a b", "c"]
    assert after == (2, ["d"], "")


@pytest.mark.parametrize("quoting", ["none", "csv"])
def test_bytes_that_are_not_text_are_named_by_line_and_position(path: Path, quoting: str) -> None:
    found = rows(path, "ok\né\t".encode() + b"\xff\n\0\nok\n\xed\xa0\x80\n", quoting)
    assert [(line, fault) for line, _, fault in found] == [
        (1, ""),
        (2, "byte 4 of the line, 0xff, is not UTF-8"),
        (3, "byte 1 of the line is NUL; text is expected"),
        (4, ""),
        (5, "byte 1 of the line, 0xed, is not UTF-8"),  # a surrogate, encoded
    ]


def test_a_bad_byte_inside_a_quoted_field_names_its_own_line(path: Path) -> None:
    assert rows(path, b'"a\nb\xffc\nd"\n', "csv")[0][2] == "line 2: byte 2 of the line, 0xff, is not UTF-8"


def test_utf16_is_refused_with_the_remedy(path: Path) -> None:
    with pytest.raises(DataError, match="looks like UTF-16 text; convert it: iconv"):
        rows(path, "a\tb\n".encode("utf-16"))


def test_what_is_no_readable_file_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent.tsv: no such file"):
        list(read_records(str(tmp_path / "absent.tsv")))
    with pytest.raises(DataError, match="is a folder; a file is expected"):
        list(read_records(str(tmp_path)))
    with pytest.raises(DataError, match="cannot be read"):
        list(read_records(str(tmp_path / "a\0b")))
    with pytest.raises(DataError, match="cannot be read"):
        list(read_records(str(tmp_path / ("n" * 5000))))


def test_an_unreadable_file_is_a_data_error(path: Path) -> None:
    path.write_text("a\tb\n")
    path.chmod(0)
    user = os.geteuid()
    if user == 0:  # root may read everything
        os.seteuid(65534)
    try:
        with pytest.raises(DataError, match="rows.tsv: cannot be read: Permission denied"):
            list(read_records(str(path)))
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("quoting", ["none", "csv"])
def test_blocks_do_not_show(path: Path, quoting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    long = "长" * 50
    content = f'\ufeffa\t{long}\r\n\r\nb\t"c{long}\n{long}"\n\0\nlast'.encode() + b"\xfe"
    whole = rows(path, content, quoting)
    for size in (4, 5, 7, 64):
        monkeypatch.setattr(lines, "BLOCK_BYTES", size)
        assert rows(path, content, quoting) == whole


def test_a_reader_who_stops_early_reads_no_further(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "BLOCK_BYTES", 8)
    path.write_bytes(b"a\tb\nc\td\n" + b'"never closed\n' * 3)
    assert next(read_records(str(path), QUOTED_TSV)).cells == ["a", "b"]


cell = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
table = st.lists(st.lists(cell, min_size=1, max_size=4), max_size=6)


@FAST
@given(table, st.sampled_from(["\n", "\r\n"]))
def test_quoted_rows_come_back_as_the_csv_module_wrote_them(
    path: Path, cells: list[list[str]], end: str
) -> None:
    cells = [["x"]] * 200 + cells  # else many carriage returns in few lines look like a file of their own
    text = io.StringIO(newline="")
    csv.writer(text, delimiter="\t", lineterminator=end, quoting=csv.QUOTE_ALL).writerows(cells)
    assert [(row, fault) for _, row, fault in rows(path, text.getvalue().encode(), "csv")] == [
        (row, "") for row in cells
    ]


@FAST
@given(st.lists(st.sampled_from(['"', '""', "\t", "\n", "\r\n", "a", "é ", "'"]), max_size=25))
def test_any_quoting_reads_as_the_csv_module_reads_it(path: Path, pieces: list[str]) -> None:
    text = "".join(pieces)
    expected = list(csv.reader(io.StringIO(text, newline=""), delimiter="\t"))
    more = csv.reader(io.StringIO(text + "\nlast\trow", newline=""), delimiter="\t")
    is_closed = list(more)[-1] == ["last", "row"]  # else an open quote has swallowed it
    try:
        found = [row for _, row, _ in rows(path, text.encode(), "csv")]
    except DataError as error:
        assert "never closed" in str(error)
        assert not is_closed
        return
    assert is_closed
    assert [row for row in found if "".join(row).strip()] == [row for row in expected if "".join(row).strip()]


@FAST
@given(st.binary(max_size=80), st.sampled_from(["none", "csv"]))
def test_arbitrary_bytes_are_rows_or_a_data_error(path: Path, content: bytes, quoting: str) -> None:
    try:
        found = rows(path, content, quoting)
    except DataError:
        return
    for _, cells, fault in found:
        "".join(cells).encode("utf-8", "strict" if not fault else "surrogateescape")
    assert [line for line, _, _ in found] == sorted({line for line, _, _ in found})
