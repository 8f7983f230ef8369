"""The safetensors format: what we write others read, what we accept they read alike, the rest is refused."""

import json
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bertpair.checkpoints.tensor_file import encode_header, file_order, parse_tensors, tensor_bytes
from bertpair.errors import CheckpointError


def encode(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    body = b"".join(bytes(tensor_bytes(tensors[name])) for name in file_order(tensors))
    return encode_header(tensors, metadata or {}) + body


def raw(header: object, body: bytes = b"") -> bytearray:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return bytearray(len(text).to_bytes(8, "little") + text + body)


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


def test_what_was_written_is_read_without_a_copy() -> None:
    data = bytearray(encode(TENSORS, {"format": "pt"}))
    tensors, metadata = parse_tensors(data)
    assert metadata == {"format": "pt"} and tensors.keys() == TENSORS.keys()
    assert all(tensors[n].dtype == t.dtype and torch.equal(tensors[n], t) for n, t in TENSORS.items())
    tensors["b"][0, 0] = 99
    assert parse_tensors(data)[0]["b"][0, 0] == 99


def test_tensors_of_a_file_that_aligns_nothing_are_read() -> None:
    header = {"x": entry("U8", [1], [0, 1]), "y": entry("F32", [1], [1, 5]), "z": entry("I64", [], [5, 13])}
    body = b"\x05" + bytes(tensor_bytes(torch.tensor([0.5]))) + bytes(tensor_bytes(torch.tensor(-3)))
    for pad in range(8):
        tensors, _ = parse_tensors(raw(json.dumps(header).encode() + b" " * pad, body))
        assert (tensors["x"].item(), tensors["y"].item(), tensors["z"].item()) == (5, 0.5, -3)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (bytearray(b""), "too few"),
        (bytearray(b"\x01\0\0"), "too few"),
        (bytearray(b"\xff" * 8 + b"{}"), "is stated"),
        (raw(b" " * (5 << 20)), "is stated"),
        (raw(b"[]"), "object"),
        (raw(b"\xef\xbb\xbf{}"), "object"),
        (raw(b"{"), "JSON"),
        (raw(b"\xff"), "JSON"),
        (raw(b'{"a":' + b"[" * 100_000), "JSON"),
        (raw(b'{"__metadata__":{"a":NaN}}'), "strings"),
        (raw(b'{"a":{},"a":{}}'), "twice"),
        (raw({"__metadata__": {"a": 1}}), "strings"),
        (raw({"a": 1}), "must have"),
        (raw({"a": {**entry(), "more": 1}}, b"x" * 8), "must have"),
        (raw({"a": entry(dtype="Q4")}, b"x" * 8), "dtype 'Q4'"),
        (raw({"a": entry(dtype=["F32"])}, b"x" * 8), "dtype"),
        (raw({"a": entry(shape=[3])}, b"x" * 8), "its shape needs 12"),
        (raw({"a": entry(shape=[-2])}, b"x" * 8), "shape"),
        (raw({"a": entry(shape=[True, 2])}, b"x" * 8), "shape"),
        (raw({"a": entry(shape=[0, 2**62, 2**62], offsets=[0, 0])}), "shape"),
        (raw({"a": entry(shape=[1] * 40)}), "shape"),
        (raw({"a": entry(offsets=[8, 0])}, b"x" * 8), "its shape needs 8"),
        (raw({"a": entry(offsets=[0, 8, 8])}, b"x" * 8), "offsets"),
        (raw({"a": entry()}, b"x" * 9), "the file has 9"),
        (raw({"a": entry()}, b"x" * 7), "the file has 7"),
        (raw({"a": entry(offsets=[4, 12])}, b"x" * 12), "gap"),
        (raw({"a": entry(), "b": entry()}, b"x" * 8), "overlap"),
    ],
)
def test_a_wrong_header_is_refused(data: bytearray, complaint: str) -> None:
    with pytest.raises(CheckpointError, match=complaint) as caught:
        parse_tensors(data)
    assert len(str(caught.value)) < 400


def read_as_others_do(data: bytearray) -> None:
    try:
        tensors, _ = parse_tensors(data)
    except CheckpointError:
        return
    theirs = safetensors.torch.load(bytes(data))
    assert tensors.keys() == theirs.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == theirs[name].dtype and tensor.shape == theirs[name].shape
        assert bytes(tensor_bytes(tensor)) == bytes(tensor_bytes(theirs[name]))


SIZES = st.lists(st.integers(-1, 4) | st.sampled_from([2**31, 2**63, 2**64]), max_size=4)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "I64", "BF16", "F8_E4M3", "?", ""]) | st.none(),
        "shape": SIZES | st.none(),
        "data_offsets": st.tuples(st.integers(0, 16), st.integers(0, 16)) | SIZES,
    }
)


HEADERS = st.dictionaries(st.text(max_size=3), ENTRIES, max_size=3)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=120) | HEADERS, st.binary(max_size=20))
def test_arbitrary_files_are_refused_or_read_as_others_do(header: Any, body: bytes) -> None:
    read_as_others_do(raw(header, body))
    if isinstance(header, bytes):
        read_as_others_do(bytearray(header + body))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_damaged_file_is_refused_or_read_as_others_do(data: st.DataObject) -> None:
    damaged = bytearray(encode({"a": torch.ones(2, 3), "b": torch.ones(1, dtype=torch.uint8)}, {"k": "v"}))
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    read_as_others_do(damaged)


def test_a_header_that_could_not_be_read_back_is_not_written() -> None:
    with pytest.raises(ValueError, match="allowed"):
        encode_header({"x": torch.ones(1)}, {"k": "v" * (5 << 20)})
