"""The safetensors format: what we write others read, what others read we read alike, the rest is refused."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bertpair.checkpoints.tensor_file import encode_tensors, parse_tensors
from bertpair.errors import CheckpointError


def encode(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    return b"".join(map(bytes, encode_tensors(tensors, metadata)))


def raw(header: object, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


TENSORS = {
    "b": torch.arange(6.0).reshape(2, 3),
    "a": torch.tensor(7, dtype=torch.int64),
    "é中": torch.arange(3, dtype=torch.uint8),
    "h": torch.arange(3, dtype=torch.bfloat16),
    "none": torch.empty(3, 0),
}


def test_the_bytes_are_those_of_safetensors() -> None:
    assert encode(TENSORS, {"format": "pt"}) == safetensors.torch.save(TENSORS, {"format": "pt"})
    assert encode({}) == safetensors.torch.save({})


def test_what_was_written_is_read_here_and_elsewhere(tmp_path: Path) -> None:
    data = encode(TENSORS, {"format": "pt"})
    tensors = parse_tensors(data, "x")
    assert tensors.keys() == TENSORS.keys()
    assert all(tensors[n].dtype == t.dtype and torch.equal(tensors[n], t) for n, t in TENSORS.items())
    (tmp_path / "x").write_bytes(data)
    with safetensors.safe_open(tmp_path / "x", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_tensors_of_a_file_that_aligns_nothing_are_read() -> None:
    header = {"x": entry("U8", [1], [0, 1]), "y": entry("F32", [1], [1, 5]), "z": entry("I64", [], [5, 13])}
    body = struct.pack("<Bfq", 5, 0.5, -3)
    for pad in range(8):
        tensors = parse_tensors(raw(json.dumps(header).encode() + b" " * pad, body), "x")
        assert (tensors["x"].item(), tensors["y"].item(), tensors["z"].item()) == (5, 0.5, -3)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01\0\0",
        b"\xff" * 8 + b"{}",
        raw(b"[]"),
        raw(b"{"),
        raw(b"\xff"),
        raw(b'{"a":' + b"[" * 100_000),
        raw(b'{"__metadata__":{"a":NaN}}'),
        raw({"__metadata__": {"a": 1}}),
        raw({"a": 1}),
        raw({"a": entry(dtype="Q4")}, b"x" * 8),
        raw({"a": entry(shape=[3])}, b"x" * 8),
        raw({"a": entry(shape=[-2])}, b"x" * 8),
        raw({"a": entry(shape=[0, 2**62, 2**62], offsets=[0, 0])}),
        raw({"a": entry(offsets=[8, 0])}, b"x" * 8),
        raw({"a": entry(offsets=[0, 8, 8])}, b"x" * 8),
        raw({"a": entry()}, b"x" * 9),
        raw({"a": entry()}, b"x" * 7),
        raw({"a": entry(offsets=[4, 12])}, b"x" * 12),
        raw({"a": entry(), "b": entry()}, b"x" * 8),
    ],
)
def test_a_damaged_file_is_refused_by_its_name(data: bytes) -> None:
    with pytest.raises(CheckpointError, match="checkpoint-1/x: not a whole safetensors file"):
        parse_tensors(data, "checkpoint-1/x")


def read_or_refuse(data: bytes) -> None:
    """Whatever is read is as large as it says."""
    try:
        tensors = parse_tensors(data, "x")
    except CheckpointError:
        return
    assert sum(tensor.nbytes for tensor in tensors.values()) <= len(data)


SIZES = st.lists(st.integers(-1, 4) | st.sampled_from([2**31, 2**63, 2**64]), max_size=4)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "I64", "BF16", "F8_E4M3", "F4", "?", ""]) | st.none(),
        "shape": SIZES | st.none(),
        "data_offsets": st.tuples(st.integers(0, 16), st.integers(0, 16)) | SIZES,
    }
)
HEADERS = st.dictionaries(st.text(max_size=3), ENTRIES, max_size=3)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=120) | HEADERS, st.binary(max_size=20))
def test_arbitrary_files_are_refused_or_read(header: Any, body: bytes) -> None:
    read_or_refuse(raw(header, body))
    if isinstance(header, bytes):
        read_or_refuse(header + body)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_damaged_file_is_refused_or_read(data: st.DataObject) -> None:
    damaged = bytearray(encode({"a": torch.ones(2, 3), "b": torch.ones(1, dtype=torch.uint8)}, {"k": "v"}))
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    read_or_refuse(bytes(damaged))


def test_a_header_that_could_not_be_read_back_is_not_written() -> None:
    with pytest.raises(ValueError, match="allowed"):
        encode({"x": torch.ones(1)}, {"k": "v" * (5 << 20)})
