"""CSV, JSON Lines and gzip beside TSV: the same rows give the same texts, and faults name their lines."""

import csv
import gzip
import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bertpair.data.columns import Columns
from bertpair.data.dataset import Pairs, make_split
from bertpair.data.formats import CSV, JSONL, format_of
from bertpair.data.records import first_row, read_records
from bertpair.data.source import resolve_source
from bertpair.data.tokenizer import Tokenizer
from bertpair.data.tsv import read_pairs
from bertpair.errors import DataError
from bertpair.settings.data import DataSettings

FAST = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
HEADER = ["index", "sentence1", "sentence2", "label"]
FOUR = Columns(1, 2, 3)
LABELS = ("negative", "neutral", "positive")
Row = list[str]


def as_tsv(rows: list[Row]) -> str:
    return "".join("\t".join(row) + "\n" for row in rows)


def as_csv(rows: list[Row], end: str = "\n") -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=end).writerows(rows)
    return text.getvalue()


def as_jsonl(rows: list[Row]) -> str:
    lines = (json.dumps(dict(zip(rows[0], row, strict=True)), ensure_ascii=bool(row[0])) for row in rows[1:])
    return "".join(line + "\n" for line in lines)


def write(path: Path, content: str | bytes) -> Path:
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def random_rows(count: int, pieces: str, seed: int = 3) -> list[Row]:
    rng = random.Random(seed)
    texts = [["x" + "".join(rng.choices(pieces, k=rng.randint(0, 30))) for _ in "ab"] for _ in range(count)]
    return [[str(i), *pair, rng.choice(LABELS)] for i, pair in enumerate(texts)]


ANY = "abc é词数据库привет😀 \"',;|{}[]\\:\u2028\x85\x0b"


def faults(path: Path, columns: Columns = FOUR, **options: object) -> list[str]:
    """The lines of the DataError, without the folder."""
    with pytest.raises(DataError) as caught:
        read_pairs([path], columns, **options)  # type: ignore[arg-type]
    return str(caught.value).replace(f"{path.parent}/", "").splitlines()


def content(pairs: Pairs) -> tuple[list[str], list[str] | None, list[str] | None]:
    return pairs.text_a, pairs.text_b, pairs.labels


def test_the_same_rows_give_the_same_token_ids_and_labels(tmp_path: Path, vocab_file: Path) -> None:
    tokenizer = Tokenizer.from_folder(vocab_file.parent)
    rows = random_rows(2000, ANY)
    files = {"rows.tsv": as_tsv, "rows.csv": as_csv, "rows.jsonl": as_jsonl, "rows.ndjson.gz": as_jsonl}
    files |= {"rows.tsv.gz": as_tsv, "rows.CSV.gz": as_csv}
    expected = [list(column) for column in zip(*(row[1:] for row in rows), strict=True)]
    splits = []
    for name, written in files.items():
        pairs = read_pairs([write(tmp_path / name, written([HEADER, *rows]))], FOUR, labels=LABELS)
        assert list(content(pairs)) == expected, name
        assert pairs.header == tuple(HEADER)
        splits.append(make_split(pairs, LABELS, tokenizer, 24, name=name))
    for split in splits[1:]:
        assert np.array_equal(split.tokens.ids, splits[0].tokens.ids)
        assert np.array_equal(split.targets, splits[0].targets)  # type: ignore[arg-type]
    several = [tmp_path / name for name in files]
    assert len(read_pairs(several, FOUR, labels=LABELS)) == len(files) * 2000, "each by its own name"


def test_line_breaks_tabs_and_commas_come_back_from_csv_and_jsonl(tmp_path: Path) -> None:
    rows = random_rows(500, ANY + "\t\n")
    tables = [[HEADER, *rows[:i]] for i in range(500)]
    files = {"a.csv": as_csv([HEADER, *rows], "\r\n"), "a.jsonl": as_jsonl([HEADER, *rows])}
    lines = {"a.csv": [as_csv(table).count("\n") + 1 for table in tables], "a.jsonl": [*range(1, 501)]}
    for name, text in files.items():
        pairs = read_pairs([write(tmp_path / name, text)], FOUR)
        assert pairs.text_a == [row[1] for row in rows] and pairs.text_b == [row[2] for row in rows]
        assert pairs.line_of_row.tolist() == lines[name]


def test_the_format_is_told_by_the_name_or_set(tmp_path: Path) -> None:
    assert format_of("a.csv") == format_of("A.CSV.GZ") == format_of("a.txt", "csv") == CSV
    assert format_of("a.jsonl") == format_of("a.ndjson.gz") == format_of("-", "jsonl") == JSONL
    assert format_of("a.csv.tsv") == format_of("csv") == format_of("a.csv", "tsv") == format_of("-")
    path = write(tmp_path / "rows.txt", as_csv([HEADER, ["0", "a, b", "c", "x"], ["1", "d", "e", "y"]]))
    settings = DataSettings(train_file=[str(path)], file_format="csv")
    source = resolve_source(settings)
    assert source.read(source.train_files, source.columns, None).text_a == ["a, b", "d"]
    (fault,) = faults(path)
    assert fault == "rows.txt:1: looks like columns with a comma between them; read it with --file_format csv"


cell = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=8)


@FAST
@given(st.lists(st.sampled_from(['"', '""', ",", "\n", "\r\n", "\t", "a", "é ", "'"]), max_size=25))
def test_any_csv_reads_as_the_csv_module_reads_it(tmp_path: Path, pieces: list[str]) -> None:
    text = "".join(pieces)
    expected = list(csv.reader(io.StringIO(text, newline="")))
    more = list(csv.reader(io.StringIO(text + "\nlast,row", newline="")))
    path = write(tmp_path / "rows.csv", text)
    try:
        found = [record.cells for record in read_records(str(path), CSV)]
    except DataError as error:
        assert "never closed" in str(error) and more[-1] != ["last", "row"]
        return
    assert more[-1] == ["last", "row"]
    assert [row for row in found if "".join(row).strip()] == [row for row in expected if "".join(row).strip()]


@FAST
@given(st.lists(st.lists(cell, min_size=2, max_size=4), min_size=1, max_size=6))
def test_rows_come_back_as_the_csv_module_wrote_them(tmp_path: Path, rows: list[Row]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows(rows)
    path = write(tmp_path / "rows.csv", text.getvalue())
    assert [record.cells for record in read_records(str(path), CSV)] == rows


plain = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
value = plain | st.booleans() | st.none() | st.integers() | st.floats()


@FAST
@given(
    st.lists(st.dictionaries(plain.filter(bool), value, max_size=4), min_size=1, max_size=5), st.booleans()
)
def test_objects_are_read_as_json_reads_them(
    tmp_path: Path, objects: list[dict[str, object]], is_ascii: bool
) -> None:
    objects = [{"a": "x"} | each for each in objects]
    text = "\n".join(json.dumps(each, ensure_ascii=is_ascii) for each in objects)
    path = write(tmp_path / "rows.jsonl", text)
    names, *records = list(read_records(str(path), JSONL))
    assert names.cells == list(objects[0]) == first_row(path, JSONL)

    def written(each: object) -> str:
        return "" if each is None else each if isinstance(each, str) else json.dumps(each)

    assert [record.cells for record in records] == [
        [written(each.get(name)) for name in objects[0]] for each in objects
    ]
    assert [record.line for record in records] == list(range(1, len(objects) + 1))


def test_numbers_stay_as_they_are_written_and_words_are_words(tmp_path: Path) -> None:
    rows = ['{"q": 1, "a": "one", "s": 0.50}', '{"s": 1e2, "a": true, "q": "two", "more": [1]}']
    path = write(tmp_path / "rows.jsonl", "\n".join(rows))
    for columns in (Columns("q", "a", "s"), Columns(0, 1, 2), Columns(0, 1, -1, has_header=False)):
        pairs = read_pairs([path], columns, regression=True)
        assert content(pairs) == (["1", "two"], ["one", "true"], ["0.50", "1e2"])


GOOD = '{"index": 0, "sentence1": "a", "sentence2": "b", "label": "positive", "notes": [1, {"x": "\\ud800"}]}'
BAD_OBJECTS = {
    '{"sentence1": "a", "label": "positive"}': "text_b_column 2 is empty; a text is expected",
    '{"sentence1": null, "sentence2": "b", "label": "positive"}': "text_a_column 1 is empty",
    '{"sentence1": ["a"], "sentence2": "b", "label": "positive"}': "text_a_column 1 is a list; a text is exp",
    '{"sentence1": "a", "sentence2": {}, "label": "neutral"}': "text_b_column 2 is an object; a text",
    '{"sentence1": "a", "sentence2": "b\\u0000", "label": "neutral"}': "text_b_column 2 holds a NUL; text",
    '{"sentence1": "a", "sentence2": "\\ud83d", "label": "neutral"}': "text_b_column 2 holds half of a surr",
    '{"sentence1": "a", "sentence2": "b", "label": "Positiv"}': "unknown label 'Positiv'; did you mean 'pos",
    '{"sentence1": "a", "sentence2": "b"': "no JSON object: Expecting ',' delimiter (character 36 of the",
    '{"sentence1": "a", "sentence1": "b"}': "the key 'sentence1' stands there twice",
    '["a", "b"]': "expected a JSON object, found a list",
    '"a"': "expected a JSON object, found a single value",
    "12": "expected a JSON object, found a single value",
    "a\tb\tc": "no JSON object: Expecting value (character 1 of the line)",
    "": "an empty line; expected at least 4 columns",
    '{"sentence1": ' + "[" * 100_000: "no JSON object of plain values: nested too deeply",
}


@pytest.mark.parametrize("line", BAD_OBJECTS, ids=range(len(BAD_OBJECTS)))
def test_a_bad_object_is_named_with_its_line(
    tmp_path: Path, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "rows.jsonl", "\n".join([GOOD, line, GOOD, GOOD]))
    (fault,) = faults(path, labels=LABELS)
    assert fault.startswith(f"rows.jsonl:2: {BAD_OBJECTS[line]}")
    pairs = read_pairs([path], FOUR, labels=LABELS, on_bad_row="skip")
    assert pairs.line_of_row.tolist() == [1, 3, 4] and "bad rows skipped: 1 (" in caplog.text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            json.dumps([{"a": 1}, {"a": 2}]),
            ":1: looks like a JSON list; write one object a line: jq -c '.[]'",
        ),
        (
            json.dumps({"a": 1}, indent=1),
            ":1: looks like JSON over several lines; one object a line: jq -c .",
        ),
        (as_tsv([HEADER]), ":1: no JSON object: Expecting value"),
        ('{"sentence": "a"}\n', "text_a_column 1 does not exist: the first row has 1 columns"),
        ('{"a": 1, "b\\ud800": 2}', ":1: the name 'b\\ud800' holds half of a surrogate pair"),
        ("\n", "rows.jsonl: the file is empty"),
        ('{"a": 0, "b": "a", "c": "b", "d": "x"}\n' + "x\n" * 2, ":2: no JSON"),
    ],
)
def test_what_is_no_jsonl_is_said(tmp_path: Path, text: str, said: str) -> None:
    assert said in faults(write(tmp_path / "rows.jsonl", text))[0]


BAD_CSV = {
    "7,a\n": "expected at least 4 comma-separated columns, found 2",
    "7,a,b,c,positive\n": "expected 4 comma-separated columns as in the first row, found 5; is there a comma",
    '7," ",b,positive\n': "text_a_column 1 is empty; a text is expected",
    '7,"a" b,c,positive\n': "text after a closing quote; inside quotes, a quote is written twice",
    ",,,\n": "an empty line; expected at least 4 columns",
    "7,a\0,b,positive\n": "byte 4 of the line is NUL",
}


@pytest.mark.parametrize("row", BAD_CSV)
def test_a_bad_csv_row_is_named_with_its_line(tmp_path: Path, row: str) -> None:
    rows = 'index,sentence1,sentence2,label\n0,"a\nb",c,neutral\n' + row + "2,a,b,neutral\n" * 2
    path = write(tmp_path / "rows.csv", rows)
    (fault,) = faults(path, labels=LABELS)
    assert fault.startswith(f"rows.csv:4: {BAD_CSV[row]}")
    assert len(read_pairs([write(path, rows.replace(row, "") + ",,,\n\n")], FOUR)) == 3


@pytest.mark.parametrize(
    ("name", "mark", "said"),
    [
        ("a.csv", ";", "looks like columns with a semicolon between them; write a comma there instead"),
        ("a.csv", "\t", "looks like columns with a tab between them; read it with --file_format tsv"),
        ("a.tsv", ",", "looks like columns with a comma between them; read it with --file_format csv"),
    ],
)
def test_another_mark_between_the_columns_is_said(tmp_path: Path, name: str, mark: str, said: str) -> None:
    rows = [mark.join([*HEADER]), *(mark.join([str(i), "the cat", "sat", "ab"[i % 2]]) for i in range(9))]
    assert said in faults(write(tmp_path / name, "\n".join(rows)))[0]
    good = [HEADER[0] + {"a.csv": ","}.get(name, "\t").join(["", *HEADER[1:]]), *rows[1:]]
    (fault,) = faults(write(tmp_path / name, "\n".join(good)))
    assert "found 1 in each of 9 rows; they look like columns with a" in fault


def test_an_open_quote_of_a_csv_names_its_line(tmp_path: Path) -> None:
    (fault,) = faults(write(tmp_path / "a.csv", as_csv([HEADER]) + '0,a,b,x\n1,"a,b,y\n2,a,b,x\n'))
    assert fault == "a.csv:3: the quote opened here is never closed; inside quotes, a quote is written twice"


@pytest.mark.parametrize("cut", [1, 9, 300])
def test_a_gzip_file_that_is_cut_off_is_said(tmp_path: Path, cut: int) -> None:
    packed = gzip.compress(as_tsv([HEADER, *random_rows(300, ANY)]).encode())
    (fault,) = faults(write(tmp_path / "rows.tsv", packed[:-cut]))
    assert fault == "rows.tsv: a gzip file that is damaged or cut off: its end is missing"
    damaged = bytearray(packed)
    damaged[len(packed) // 2] ^= 255
    assert "damaged or cut off" in faults(write(tmp_path / "rows.tsv", bytes(damaged)))[-1]


def test_parts_of_a_gzip_file_and_its_padding_are_read(tmp_path: Path) -> None:
    parts = [
        gzip.compress(as_tsv(rows).encode()) for rows in ([HEADER], *([row] for row in random_rows(5, ANY)))
    ]
    pairs = read_pairs([write(tmp_path / "rows.tsv", b"".join(parts) + b"\0" * 600)], FOUR)
    assert pairs.text_a == [row[1] for row in random_rows(5, ANY)]
