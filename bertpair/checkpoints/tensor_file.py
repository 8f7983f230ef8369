"""The safetensors format: safetensors reads it, we write it, so that each system call of a save is ours.

The layout is 8 bytes of header length (little-endian), a JSON header, then the tensors' bytes without a
gap. Equal tensors give equal files: the order is fixed (widest type first, so that all stay aligned).
"""

import json
import sys
from collections.abc import Iterator, Mapping

import safetensors.torch
import torch
from torch import Tensor

from bertpair.errors import CheckpointError

MAX_HEADER_BYTES = 4 << 20  # the optimizer's 600 tensors of a BERT need some 80 kB
_FLOATS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_INTEGERS = {torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"}
_NAMES = {**_FLOATS, **_INTEGERS, torch.bool: "BOOL"}
assert sys.byteorder == "little", "safetensors files are little-endian, and so must be the machine"


def encode_tensors(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """A whole file, piece by piece: its header (ValueError if that is too large), then each tensor."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for name in order:
        tensor, begin = tensors[name], position
        position += tensor.nbytes
        offsets = [begin, position]
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of eight
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {len(text)} bytes; {MAX_HEADER_BYTES} are allowed")
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        flat = tensors[name].detach().to("cpu").contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data if flat.numel() else b""


def parse_tensors(data: bytes, where: str) -> dict[str, Tensor]:
    """The tensors of a whole file in memory, copied out of it; else a CheckpointError that `where` begins."""
    try:
        return safetensors.torch.load(data)
    except (safetensors.SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{where}: not a whole safetensors file ({error})") from error
