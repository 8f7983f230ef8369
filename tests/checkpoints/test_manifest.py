"""manifest.json: arbitrary bytes give a CheckpointError or a right reading, and every flipped bit shows."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertpair.checkpoints.manifest import (
    FileEntry,
    Manifest,
    encode_manifest,
    is_plain_name,
    parse_manifest,
    read_manifest,
    read_verified,
    verify_folder,
)
from bertpair.errors import CheckpointError

MANIFEST = Manifest(
    (FileEntry("a.json", 3, "ab" * 32), FileEntry("模型.bin", 0, sha256(b"").hexdigest())),
    {"python": "3.11", "torch": "2.13.0"},
    {"step": 2000, "run_id": "é\u001f\u2028", "nested": {"x": [1, 2.5, None, True]}},
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


def sealed(rest: dict[str, Any]) -> bytes:
    """What bertpair would write for these fields, whatever they are."""
    compact = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    whole = {**rest, "sha256": sha256(compact.encode("utf-8")).hexdigest()}
    return json.dumps(whole, indent=1, sort_keys=True, ensure_ascii=False).encode("utf-8") + b"\n"


def fields(**changes: object) -> dict[str, Any]:
    entry = {"name": "a", "size": 0, "sha256": "0" * 64}
    return {"format": 1, "files": [entry], "versions": {}, "meta": {}, **changes}


def test_a_manifest_reads_back() -> None:
    assert parse_manifest(encode_manifest(MANIFEST)) == MANIFEST
    assert parse_manifest(sealed(fields())).files == (FileEntry("a", 0, "0" * 64),)
    assert MANIFEST.entry("a.json").size == 3 and MANIFEST.run_id == "é\u001f\u2028"
    assert Manifest(()).run_id is None
    with pytest.raises(CheckpointError, match="b: not named"):
        MANIFEST.entry("b")


def test_every_flipped_bit_and_every_cut_shows() -> None:
    data = encode_manifest(MANIFEST)
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CheckpointError):
            parse_manifest(bytes(flipped))
    for length in range(len(data)):
        with pytest.raises(CheckpointError):
            parse_manifest(data[:length])
    with pytest.raises(CheckpointError):
        parse_manifest(data + b" ")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"format": 2}, "format 2 is unknown"),
        ({"format": True}, "damaged"),
        ({"files": {}}, "files"),
        ({"surplus": 1}, "surplus"),
        ({"versions": {"torch": 2}}, "versions"),
        ({"meta": []}, "meta"),
        ({"files": ["a"]}, r"files\.0"),
        ({"files": [{"name": "a", "size": 0}]}, r"files\.0\.sha256"),
        ({"files": [{"name": "../a", "size": 0, "sha256": "0" * 64}]}, "plain file name"),
        ({"files": [{"name": 7, "size": 0, "sha256": "0" * 64}]}, r"files\.0\.name"),
        ({"files": [{"name": "a", "size": -1, "sha256": "0" * 64}]}, r"files\.0\.size"),
        ({"files": [{"name": "a", "size": 1.0, "sha256": "0" * 64}]}, "damaged"),
        ({"files": [{"name": "a", "size": False, "sha256": "0" * 64}]}, "damaged"),
        ({"files": [{"name": "a", "size": 0, "sha256": "A" * 64}]}, r"files\.0\.sha256"),
        ({"files": [{"name": "manifest.json", "size": 0, "sha256": "0" * 64}]}, "twice"),
        ({"files": [{"name": n, "size": 0, "sha256": "0" * 64} for n in ("a", "A")]}, "twice"),
        ({"files": [{"name": n, "size": 0, "sha256": "0" * 64} for n in ("b", "a")]}, "damaged"),
    ],
)
def test_a_sealed_manifest_that_makes_no_sense_is_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        parse_manifest(sealed(fields(**changes)))


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a\\b", "C:a", "a\0b", "../a"])
def test_names_that_could_leave_the_folder_are_not_plain(name: str) -> None:
    assert not is_plain_name(name)


@pytest.mark.parametrize("name", ["a", "...", ".hidden", "model-00001-of-00002.safetensors", "名 前"])
def test_ordinary_names_are_plain(name: str) -> None:
    assert is_plain_name(name)


def parse_or_refuse(data: bytes) -> None:
    """Anything read is what would be written; anything else is refused as it should be."""
    try:
        manifest = parse_manifest(data)
    except CheckpointError:
        return
    assert json.loads(encode_manifest(manifest)) == json.loads(data)
    assert all(is_plain_name(entry.name) and entry.size >= 0 for entry in manifest.files)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300) | JSON.map(lambda value: json.dumps(value).encode()))
def test_arbitrary_bytes_are_refused_or_read_right(data: bytes) -> None:
    parse_or_refuse(data)


ENTRIES = st.fixed_dictionaries(
    {"name": st.text(max_size=4) | JSON, "size": st.integers() | JSON, "sha256": st.just("0" * 64)}
)
FIELDS = st.fixed_dictionaries(
    {
        "format": st.just(1) | JSON,
        "files": st.lists(ENTRIES, max_size=3) | JSON,
        "versions": st.dictionaries(st.text(max_size=3), st.text(max_size=3)) | JSON,
        "meta": st.dictionaries(st.text(max_size=3), JSON, max_size=3) | JSON,
    }
)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(FIELDS)
def test_arbitrary_sealed_fields_are_refused_or_read_right(rest: dict[str, Any]) -> None:
    try:
        data = sealed(rest)
    except UnicodeEncodeError:  # a lone surrogate: no such file can be
        return
    parse_or_refuse(data)


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 100_000,
        b'{"format":' + b"[" * 100_000,
        b'{"format": ' + b"9" * 5000 + b"}",
        b'{"format": NaN}',
        b"\xff\xfe{",
    ],
)
def test_hostile_json_is_refused(data: bytes) -> None:
    with pytest.raises(CheckpointError):
        parse_manifest(data)


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    entries = tuple(FileEntry(name, len(data), sha256(data).hexdigest()) for name, data in files.items())
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "manifest.json").write_bytes(encode_manifest(Manifest(entries)))


def test_all_damaged_files_are_named_at_once(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": b"1", "b": b"22", "c": b"333"})
    assert read_verified(tmp_path, "b") == b"22"
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "c").write_bytes(b"xxx")
    with pytest.raises(CheckpointError) as caught:
        verify_folder(tmp_path)
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in lines] == [str(tmp_path / "a"), str(tmp_path / "c")]
    with pytest.raises(CheckpointError, match="contents have changed"):
        read_verified(tmp_path, "a")
    (tmp_path / "c").write_bytes(b"xx")  # sizes first: nothing is hashed for a folder that is cut anyway
    with pytest.raises(CheckpointError) as caught:
        verify_folder(tmp_path)
    assert str(caught.value) == f"{tmp_path / 'c'}: 2 bytes; the manifest says 3"


def test_a_size_is_checked_before_memory_is_taken_for_it(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "manifest.json").write_bytes(encode_manifest(Manifest((FileEntry("a", 10**15, "0" * 64),))))
    with pytest.raises(CheckpointError, match="1 bytes; the manifest says 1000000000000000"):
        read_verified(tmp_path, "a")


def test_a_manifest_that_is_no_file_or_too_large_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"manifest\.json: No such file"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(CheckpointError, match="only plain files"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").rmdir()
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="larger than"):
        read_manifest(tmp_path)
    with pytest.raises(ValueError, match="allowed"):
        encode_manifest(Manifest((), {}, {"x": "x" * (5 << 20)}))
