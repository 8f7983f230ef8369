"""Rows in windows are the rows of the whole reading, in bounded memory; a fault ends at its window."""

import gzip
import io
import json
import logging
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bertpair.data.columns import Columns
from bertpair.data.dataset import Pairs
from bertpair.data.source import resolve_source
from bertpair.data.tsv import count_rows, read_pairs, read_windows
from bertpair.errors import DataError
from bertpair.settings.data import DataSettings

FAST = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
HEADER = ("index", "sentence1", "sentence2", "label")
NAMED = Columns("sentence1", "sentence2", "label", kept=("index", 1), group="index")
BARE = Columns(1, 2, 3, has_header=False, kept=(0,))
LABELS = ("x", "y")
BAD = ["7\ta", "7\ta\tb\tz", "7\t \tb\tx", "", "7\ta\tb\tc\td"]


def listed(pairs: Pairs) -> list[tuple[object, ...]]:
    """Each row with its place and all that is read of it."""
    columns = [column for column in (pairs.text_a, pairs.text_b, pairs.labels, pairs.groups) if column]
    columns += (pairs.kept or {}).values()
    return list(zip(map(pairs.where, range(len(pairs))), *columns, strict=True))


def write_files(folder: Path, files: Sequence[Sequence[str]], header: bool) -> list[Path]:
    paths = []
    for number, rows in enumerate(files):
        text = "".join(f"{row}\n" for row in ["\t".join(HEADER)] * header + list(rows))
        path = folder / f"{number}.tsv"
        path.write_bytes(gzip.compress(text.encode()) if number % 2 else text.encode())
        paths.append(path)
    return paths


def outcome(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except DataError as error:
        return str(error)


row = st.builds("{}\ta {}\tb\t{}".format, st.integers(0, 9), st.integers(0, 99), st.sampled_from("xy"))
some_rows = st.lists(st.one_of(row, row, row, st.sampled_from(BAD)), max_size=12)


@FAST
@given(
    st.lists(some_rows, min_size=1, max_size=3),
    st.booleans(),
    st.sampled_from(["error", "skip"]),
    st.integers(1, 15),
    st.none() | st.integers(1, 20),
)
@example([["0\ta\tb\tx"] * 6], True, "error", 3, 3)
def test_windows_are_the_rows_of_the_whole(
    tmp_path: Path, files: list[list[str]], header: bool, on_bad_row: str, size: int, limit: int | None
) -> None:
    paths, columns = write_files(tmp_path, files, header), NAMED if header else BARE
    how: dict[str, Any] = {"labels": LABELS, "on_bad_row": on_bad_row, "limit": limit}
    whole = outcome(lambda: read_pairs(paths, columns, **how))
    number = outcome(lambda: count_rows(paths, columns, **how))
    windows: list[Pairs] = []
    said = outcome(lambda: windows.extend(read_windows(paths, columns, window_rows=size, **how)))
    assert all(len(window) == size for window in windows[:-1])
    found = [each for window in windows for each in listed(window)]
    if isinstance(whole, str):
        assert number == whole
        assert said is not None or len(found) == limit, "what lies beyond the limit is not read"
    else:
        assert (number, said, found) == (len(whole), None, listed(whole))
        assert {window.header for window in windows} == {whole.header}
        assert [list(window.kept or {}) for window in windows] == [list(whole.kept or {})] * len(windows)


def test_a_bad_window_comes_after_the_whole_ones_before_it(tmp_path: Path) -> None:
    rows = [f"{i}\ta {i}\tb\tx" for i in range(20)]
    rows[7], rows[8], rows[15] = BAD[0], BAD[1], BAD[2]
    (path,) = write_files(tmp_path, [rows], header=True)
    windows = read_windows([path], NAMED, window_rows=3, labels=LABELS)
    assert [next(windows).text_a for _ in range(2)] == [["a 0", "a 1", "a 2"], ["a 3", "a 4", "a 5"]]
    with pytest.raises(DataError) as caught:
        next(windows)
    assert str(caught.value).replace(f"{path}:", "").splitlines() == [
        "9: expected at least 4 tab-separated columns, found 2",
        "10: unknown label 'z'; allowed: 'x', 'y'",
    ]
    with pytest.raises(StopIteration):
        next(windows)


def test_a_missing_file_is_said_in_place_of_its_window(tmp_path: Path) -> None:
    paths = write_files(tmp_path, [["0\ta\tb\tx"] * 5], header=True)
    windows = read_windows([*paths, tmp_path / "absent.tsv"], NAMED, window_rows=4, labels=LABELS)
    assert len(next(windows)) == 4
    with pytest.raises(DataError, match="absent.tsv: no such file"):
        next(windows)


def test_what_a_count_has_said_is_not_said_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = write_files(
        tmp_path, [["0\ta\tb\tx\tz", *["1\tc\td\ty\t"] * 5, "2\te\tf\ty", BAD[0]]], header=False
    )
    how: dict[str, Any] = {"labels": LABELS, "on_bad_row": "skip", "limit": 6}
    with caplog.at_level(logging.INFO, "bertpair"):
        read_pairs(paths, BARE, **how)
        said = [record.message for record in caplog.records]
        caplog.clear()
        assert count_rows(paths, BARE, **how) == 6
        assert [record.message for record in caplog.records] == said and len(said) > 0
        caplog.clear()
        assert len(list(read_windows(paths, BARE, window_rows=4, is_checked=True, **how))) == 2
    assert not caplog.records


def test_a_source_counts_and_reads_in_windows_what_it_reads(tmp_path: Path) -> None:
    paths = write_files(tmp_path, [[f"{i}\ta {i}\tb\tx" for i in range(9)]], header=True)
    config = DataSettings(dev_file=list(map(str, paths)), max_eval_samples=7, group_column="index")
    source = resolve_source(config, needs=("dev",))
    columns = source.columns_for(paths[0], with_labels=True, kept=["index", 1])
    whole = source.read(paths, columns, LABELS)
    assert source.count(paths, columns, LABELS) == len(whole) == 7
    windows = list(source.windows(paths, columns, LABELS, 3))
    assert [len(window) for window in windows] == [3, 3, 1]
    assert [each for window in windows for each in listed(window)] == listed(whole)
    assert whole.kept == {"index": list("0123456"), "sentence1": [f"a {i}" for i in range(7)]}
    assert whole.groups == list("0123456")
    picked = whole.take(np.array([4, 0]))
    assert picked.kept == {"index": ["4", "0"], "sentence1": ["a 4", "a 0"]} and picked.groups == ["4", "0"]


READ_STDIN = """
import sys
from bertpair.data.columns import Columns
from bertpair.data.source import resolve_source
from bertpair.errors import DataError
from bertpair.settings.data import DataSettings
source = resolve_source(DataSettings(dev_file=["-"], **eval(sys.argv[1])), needs=("dev",))
columns = source.columns_for(source.dev_files[0], with_labels=False, kept=[0])
try:
    for window in source.windows(source.dev_files, columns, None, 3):
        print(window.where(0), *window.text_a, *list(window.kept.values())[0], sep="|")
except DataError as error:
    print(error)
"""


def read_stdin(data: bytes, **settings: object) -> list[str]:
    command = [sys.executable, "-c", READ_STDIN, repr(settings)]
    done = subprocess.run(command, input=data, capture_output=True, timeout=60, check=True)
    return done.stdout.decode().splitlines()


def test_the_standard_input_is_read_once(tmp_path: Path) -> None:
    text = "".join(
        "\t".join(row) + "\n" for row in [HEADER, *((str(i), f"a{i}", "b", "x") for i in range(5))]
    )
    expected = ["standard input:2|a0|a1|a2|0|1|2", "standard input:5|a3|a4|3|4"]
    assert read_stdin(text.encode()) == read_stdin(gzip.compress(text.encode())) == expected
    objects = b"".join(b'{"index": %d, "sentence1": "a%d", "sentence2": "b"}\n' % (i, i) for i in range(5))
    assert read_stdin(objects, file_format="jsonl") == [
        "standard input:1|a0|a1|a2|0|1|2",
        "standard input:4|a3|a4|3|4",
    ]
    assert read_stdin(text.encode() + b"5\tonly\n", max_eval_samples=3) == expected[:1]
    assert read_stdin(text.encode() + b"5\tonly\n") == [
        expected[0],
        "standard input:7: expected at least 3 tab-separated columns, found 2",
    ]
    assert read_stdin(gzip.compress(text.encode())[:-5])[-1].startswith("standard input: a gzip file that is")
    assert read_stdin(b"") == ["standard input: the file is empty"]


def test_a_header_on_a_headerless_standard_input_is_said_at_once() -> None:
    rows = "".join(f"{i}\ta {i}\tb\tx\n" for i in range(9))
    (said,) = read_stdin(("\t".join(HEADER) + "\n" + rows).encode(), has_header=False)
    assert said.startswith("standard input:1: looks like a header: it has 'sentence1', 'sentence2' as names")


def test_what_reads_twice_refuses_the_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    class Untouched(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise AssertionError("it is not for this")

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Untouched()))
    source = resolve_source(DataSettings(train_file=["-"], dev_file=["-"], task_name="cola"))
    for read in (read_pairs, count_rows, source.read, source.count):
        more = {"labels": None} if read.__name__ in ("read", "count") else {}
        with pytest.raises(DataError, match="standard input: can be read only once"):
            read(source.train_files, source.columns, **more)  # type: ignore[operator]


@pytest.mark.parametrize("name", ["rows.tsv", "rows.csv.gz", "rows.jsonl"])
def test_memory_does_not_grow_with_the_rows(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bertpair.data.lines.BLOCK_BYTES", 1 << 16)
    rng = random.Random(1)

    def peak(count: int) -> tuple[int, int]:
        """Bytes at most while so many rows are counted, and while they are read in windows."""
        mark = "," if "csv" in name else "\t"
        rows = [mark.join((str(i), "a" * rng.randint(60, 99), "b", rng.choice("xy"))) for i in range(count)]
        lines = [mark.join(HEADER), *rows, "", "", *rows[:9], *([""] * count)]
        if "jsonl" in name:
            lines = [json.dumps(dict(zip(HEADER, row.split("\t"), strict=True))) for row in rows]
        text = "".join(f"{line}\n" for line in lines).encode()
        path = tmp_path / name
        path.write_bytes(gzip.compress(text) if name.endswith("gz") else text)
        del rows, lines, text
        found = []
        how: dict[str, Any] = {"labels": LABELS, "on_bad_row": "skip"}
        for read in (
            lambda: count_rows([path], NAMED, **how),
            lambda: sum(map(len, read_windows([path], NAMED, window_rows=512, **how))),
        ):
            tracemalloc.start()
            assert read() >= count
            found.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        return found[0], found[1]

    small, large = peak(10_000), peak(40_000)
    assert large[0] < 1.3 * small[0] and large[1] < 1.3 * small[1], (small, large)
