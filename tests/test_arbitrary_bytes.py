"""Any bytes at all as a file that somebody hands us: a right reading or an error of ours, within bounds.

Each reading has a few seconds of processor time and a few hundred MB of address space; beyond them it fails.
"""

import contextlib
import csv
import gzip
import json
import mmap
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from conftest import TINY_CONFIG
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bertpair.checkpoints.atomic import staged_folder
from bertpair.checkpoints.manifest import FileEntry, Manifest, encode_manifest, verify_folder
from bertpair.checkpoints.tensor_file import encode_tensors, parse_tensors
from bertpair.data.columns import Columns
from bertpair.data.records import first_row
from bertpair.data.tsv import read_pairs
from bertpair.errors import BertpairError
from bertpair.model.config import read_folder
from bertpair.model.pretrained import read_weights
from bertpair.settings.command_line import parse_command_line
from bertpair.settings.config import Config

SECONDS = 10.0  # of processor time, which other work on the machine does not take
BYTES = 256 << 20
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Processor time and memory for one reading; more raises TimeoutError or MemoryError."""

    def late(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"still reading after {SECONDS} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)


def read_or_refuse(read: Callable[[], Any]) -> Any:
    """What `read` gives; None where it raises an error of ours, with something to say."""
    with bounded():
        try:
            return read()
        except BertpairError as error:
            assert str(error)
            return None


def damaged(*originals: bytes) -> st.SearchStrategy[bytes]:
    """One of the originals with pieces cut out, put in, or written over."""

    def damage(data: bytes, cuts: list[tuple[float, int, bytes]]) -> bytes:
        for place, length, piece in cuts:
            start = int(place * len(data))
            data = data[:start] + piece + data[start + length :]
        return data

    cut = st.tuples(st.floats(0, 1), st.integers(0, 12), st.binary(max_size=6))
    return st.builds(damage, st.sampled_from(originals), st.lists(cut, min_size=1, max_size=4))


# Few bytes, some bytes very often, and long runs between others.
LONG = st.builds(
    lambda before, piece, times, after: before + piece * times + after,
    st.binary(max_size=9),
    st.binary(max_size=9),
    st.integers(0, 30_000),
    st.binary(max_size=9),
)
JUNK = st.binary(max_size=200) | LONG
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=12,
)
DEEP = b"[" * 200_000
DIGITS = b"1" * 100_000


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_bounds_are_bounds() -> None:
    with pytest.raises(OSError), bounded():  # mapped anew: what was freed earlier may be had again
        mmap.mmap(-1, 2 * BYTES)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TimeoutError):
        patch.setitem(globals(), "SECONDS", 0.05)
        with bounded():
            while True:
                pass


ROWS = 'index\tsentence1\tsentence2\tlabel\n0\t中文\tb\tx\n1\t"a\tb"\ty\n'.encode()


@FUZZ
@given(JUNK | damaged(ROWS), st.sampled_from(["none", "csv"]), st.booleans())
@example(b'"' * 200_001, "csv", False)
@example(b'a\tb\tc\t"' + b'""\n' * 100_000, "csv", False)
@example(b"\t" * 1_000_000, "none", True)
@example(b"\n" * 300_000 + b"x", "none", True)
@example(b"\xff\xfe", "none", True)
def test_any_bytes_as_a_tsv(content: bytes, quoting: str, skip: bool) -> None:
    path = Path("train.tsv")
    path.write_bytes(content)
    columns, on_bad_row = Columns(1, 2, 3, quoting=quoting), "skip" if skip else "error"
    read_or_refuse(lambda: first_row(path, columns.format_of(path)))
    pairs = read_or_refuse(lambda: read_pairs([path], columns, on_bad_row=on_bad_row))
    if pairs is not None:
        text = content.decode("utf-8-sig", "surrogateescape")
        assert len(pairs.text_a) == len(pairs.labels) == len(pairs.line_of_row)
        assert all(cell.replace('"', "") in text.replace('"', "") for cell in pairs.text_a)


ROWS_CSV = 'index,sentence1,sentence2,label\r\n0,中文,"b, c",x\r\n1,"a\n""b""",d,y\r\n'.encode()
OBJECTS = b"".join(
    json.dumps({"index": i, "sentence1": "é", "sentence2": "a [1]", "label": None if i else 0.5}).encode()
    + b"\n"
    for i in range(3)
)


@FUZZ
@given(
    JUNK | damaged(ROWS_CSV, OBJECTS, ROWS), st.sampled_from(["csv", "jsonl"]), st.booleans(), st.booleans()
)
@example(b'"' * 200_001, "csv", False, False)
@example(b"a,b,c," + b'"\n"' * 100_000, "csv", True, False)
@example(b"," * 1_000_000, "csv", False, True)
@example(b'{"a": 1, "b": ' + DEEP, "jsonl", False, False)
@example(OBJECTS + b'{"index": ' * 50_000, "jsonl", True, True)
@example(b'{"index": 1, "sentence1": "' + b"\\ud800" * 20_000 + b'"}', "jsonl", True, False)
@example(b'{"a": 1, "b": ' + DIGITS + b', "c": 1, "d": 2}', "jsonl", False, True)
def test_any_bytes_as_csv_or_jsonl(content: bytes, file_format: str, skip: bool, packed: bool) -> None:
    """Those that are read are what Python's own readers make of them."""
    path = Path("train")
    path.write_bytes(gzip.compress(content) if packed else content)
    columns = Columns(1, 2, 3, file_format=file_format, kept=(0,))
    read_or_refuse(lambda: first_row(path, columns.format_of(path)))
    on_bad_row = "skip" if skip else "error"
    pairs = read_or_refuse(lambda: read_pairs([path], columns, on_bad_row=on_bad_row))
    if pairs is None:
        return
    (kept,) = pairs.kept.values()
    assert len(pairs.text_a) == len(pairs.labels) == len(pairs.line_of_row) == len(kept)
    lines = content.decode("utf-8-sig", "surrogateescape").split("\n")
    csv.field_size_limit(len(content) + 1)
    for row, line in enumerate(pairs.line_of_row):
        if file_format == "jsonl":
            found = json.loads(lines[line - 1], parse_int=str, parse_float=str, parse_constant=str)
            (value,) = (value for name, value in found.items() if name.strip() == pairs.header[1])
            assert pairs.text_a[row] in (value, json.dumps(value))
        elif b"\r" not in content.replace(b"\r\n", b""):  # alone, it ends a line for the csv module
            cells = next(csv.reader(f"{each}\n" for each in lines[line - 1 :]))
            assert pairs.text_a[row] == cells[1]


PACKED = gzip.compress(ROWS, mtime=0)


@FUZZ
@given(damaged(PACKED, PACKED + PACKED))
def test_any_damage_to_a_gzip_file(content: bytes) -> None:
    Path("train.tsv").write_bytes(content)
    pairs = read_or_refuse(lambda: read_pairs(["train.tsv"], Columns(1, 2, 3), on_bad_row="skip"))
    if pairs is not None and content.startswith(PACKED[:2]):
        assert set(pairs.text_a) <= {"中文", '"a'}


CONFIG = json.dumps({**TINY_CONFIG, "vocab_size": 99, "id2label": {"0": "a", "1": "b"}}).encode()


@FUZZ
@given(
    JUNK
    | damaged(CONFIG)
    | st.builds(
        lambda name, value: json.dumps({**TINY_CONFIG, name: value}).encode(),
        st.sampled_from([*TINY_CONFIG, "id2label", "label2id", "num_labels", "problem_type", "torch_dtype"]),
        JSON,
    )
)
@example(DEEP)
@example(b'{"vocab_size": ' + DIGITS + b"}")
@example(b'{"a": 1, ' * 50_000)
@example(b'{"hidden_size": 1e999, "model_type": "bert"}')
def test_any_bytes_as_config_json(content: bytes) -> None:
    Path("config.json").write_bytes(content)
    folder = read_or_refuse(lambda: read_folder(Path(".")))
    if folder is not None:
        said = json.loads(content.decode("utf-8-sig"))
        assert folder.raw == said or said != said
        assert folder.config.hidden_size == said.get("hidden_size", folder.config.hidden_size)


SETTINGS = b"seed: 3\nlearning_rate: 2e-5\nlabels: [a, 'yes']\nclass_weights: {a: 1.5, b: 2}\n"
LAUGHS = b"a: &a [x]\n" + b"".join(
    b"%c: &%c [%b]\n" % (n, n, b",".join([b"*%c" % (n - 1)] * 9)) for n in range(98, 123)
)
PUNCTUATION = st.text(st.sampled_from("ab:[]{}&*!|>-?%@'\"#, \n\t"), max_size=60).map(str.encode)


@pytest.mark.slow
@FUZZ
@given(JUNK | damaged(SETTINGS) | PUNCTUATION)
@example(LAUGHS)
@example(DEEP)
@example(b"{" * 20_000)
@example(b"- " * 100_000)
@example(b"seed: " + DIGITS)
@example(b"learning_rate: " + DIGITS + b".0")
@example(b"? " * 5_000)
@example(b'a: "' + b"\\x41" * 50_000 + b'"')
def test_any_bytes_as_yaml(content: bytes) -> None:
    Path("settings.yaml").write_bytes(content)
    parsed = read_or_refuse(lambda: parse_command_line(["--config", "settings.yaml"], "evaluate"))
    assert parsed is None or isinstance(parsed.config, Config)


WHOLE = Manifest((FileEntry("a", 1, "0" * 64), FileEntry("b", 0, "1" * 64)), {"torch": "2"}, {"step": 3})
BIG = Manifest((FileEntry("big", 10**15, "0" * 64),))


@FUZZ
@given(JUNK | damaged(encode_manifest(WHOLE)) | JSON.map(json.dumps).map(str.encode))
@example(DEEP)
@example(DIGITS)
@example(encode_manifest(BIG))
def test_any_bytes_as_a_manifest(content: bytes) -> None:
    """Only the manifest that was written is ever accepted."""
    folder = Path("checkpoint-1")
    if not folder.exists():
        with staged_folder(folder) as staging:
            staging.write_bytes("a", b"x")
        folder.joinpath("original").write_bytes((folder / "manifest.json").read_bytes())
    original = folder.joinpath("original").read_bytes()
    folder.joinpath("manifest.json").write_bytes(content)
    assert read_or_refuse(lambda: verify_folder(folder)) is None or content == original


TENSORS = {"w": torch.ones(2, 3), "n": torch.arange(4)}
HEADER, *PIECES = map(bytes, encode_tensors(TENSORS, {"format": "pt"}))
BODY = b"".join(PIECES)


def length(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


def shaped(shape: str, begin: int, end: int) -> bytes:
    return b'{"w":{"dtype":"F32","shape":%b,"data_offsets":[%d,%d]}}' % (shape.encode(), begin, end)


HEADERS = damaged(HEADER[8:]).map(lambda header: length(header) + BODY)


@FUZZ
@given(JUNK | JUNK.map(length) | damaged(HEADER + BODY) | HEADERS)
@example(HEADER + BODY)
@example((2**63).to_bytes(8, "little") + b"{}")
@example(length(DEEP))
@example(length(shaped("[4611686018427387904, 4]", 0, 0)))
@example(length(shaped("[" + "0," * 100_000 + "0]", 0, 0)))
@example(length(shaped("[1000000000000]", 0, 4_000_000_000_000)))
@example(length(shaped("[-1]", 0, 0)))
@example(length(b'{"a":' + DIGITS + b"}"))
def test_any_bytes_as_a_safetensors_file(content: bytes) -> None:
    Path("model.safetensors").write_bytes(content)
    ours = read_or_refuse(lambda: parse_tensors(content, "model.safetensors"))
    theirs = read_or_refuse(lambda: read_weights(Path("model.safetensors")))
    for tensors in (ours, theirs):
        if tensors is not None:
            assert sum(t.numel() * t.element_size() for t in tensors.values()) <= len(content)
    if ours is not None and theirs is not None:
        assert ours.keys() == theirs.keys()
    if content == HEADER + BODY:
        assert torch.equal(ours["w"], TENSORS["w"]) and torch.equal(theirs["n"], TENSORS["n"])
