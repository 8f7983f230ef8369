"""The safetensors format, both ways: a header to write before the tensors, and strict reading from memory.

The layout is 8 bytes of header length (little-endian), a JSON header, then the tensors' bytes without a
gap. Equal tensors give equal files: the order is fixed (widest type first, so that all stay aligned).
"""

import json
import math
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bertpair.errors import CheckpointError, show
from bertpair.settings.files import parse_json

MAX_HEADER_BYTES = 4 << 20  # the optimizer's 600 tensors of a BERT need some 80 kB
_DTYPES = {
    "F64": torch.float64,
    "I64": torch.int64,
    "F32": torch.float32,
    "I32": torch.int32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
assert sys.byteorder == "little", "safetensors files are little-endian, and so must be the machine"


def file_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names in the order in which the tensors' bytes follow the header."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def encode_header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """What comes before the tensors' bytes, which follow in `file_order`; ValueError if too large."""
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for name in file_order(tensors):
        tensor = tensors[name]
        end = position + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of eight
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {len(text)} bytes; {MAX_HEADER_BYTES} are allowed")
    return len(text).to_bytes(8, "little") + text


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, without a copy if it is contiguous and on the CPU."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def parse_tensors(data: bytearray) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a whole file in memory; the tensors are views of `data`, without a copy.

    CheckpointError unless the header is short, names each tensor once, and describes every byte.
    """
    header, start = _parse_header(data)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError("__metadata__ must map names to strings")
    spans = {name: _parse_entry(name, entry) for name, entry in header.items()}
    _check_cover([span[2] for span in spans.values()], len(data) - start)
    buffer = torch.frombuffer(data, dtype=torch.uint8)
    tensors = {}
    for name, (dtype, shape, (begin, end)) in spans.items():
        part = buffer[start + begin : start + end]
        aligned = (start + begin) % _width(dtype) == 0
        tensors[name] = (part if aligned else part.clone()).view(dtype).reshape(shape)
    return tensors, metadata


def _parse_header(data: bytearray) -> tuple[dict[str, Any], int]:
    if len(data) < 8:
        raise CheckpointError(f"{len(data)} bytes are too few for a safetensors file")
    length = int.from_bytes(data[:8], "little")
    if length > min(MAX_HEADER_BYTES, len(data) - 8):
        limits = f"{len(data) - 8} bytes follow, {MAX_HEADER_BYTES} are allowed"
        raise CheckpointError(f"a header of {length} bytes is stated; {limits}")
    if data[8:9] != b"{":
        raise CheckpointError("its header is not a JSON object")
    return parse_json(data[8 : 8 + length], "its header"), 8 + length


def _parse_entry(name: str, entry: object) -> tuple[torch.dtype, list[int], tuple[int, int]]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"tensor {show(name)} must have a dtype, a shape and data_offsets")
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        known = ", ".join(_DTYPES)
        raise CheckpointError(f"tensor {show(name)} has dtype {show(entry['dtype'])}; allowed: {known}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _is_shape(shape) or not _is_shape(offsets) or len(offsets) != 2:
        raise CheckpointError(f"tensor {show(name)} has shape {show(shape)}, offsets {show(offsets)}")
    needed = math.prod(shape) * _width(dtype)
    if offsets[1] - offsets[0] != needed:
        found = offsets[1] - offsets[0]
        raise CheckpointError(f"tensor {show(name)} takes {found} bytes; its shape needs {needed}")
    return dtype, shape, (offsets[0], offsets[1])


def _width(dtype: torch.dtype) -> int:
    return torch.empty(0, dtype=dtype).element_size()


def _is_shape(value: object) -> bool:
    """Sizes that torch can hold, even where a zero among them makes the product zero."""
    if not isinstance(value, list) or len(value) > 16:
        return False
    return all(type(size) is int and size >= 0 for size in value) and math.prod(s or 1 for s in value) < 2**60


def _check_cover(spans: list[tuple[int, int]], size: int) -> None:
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise CheckpointError(f"its tensors overlap or leave a gap at byte {min(begin, position)}")
        position = end
    if position != size:
        raise CheckpointError(f"its tensors take {position} bytes, the file has {size} for them")
