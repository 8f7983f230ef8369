"""Weight files → tensors by their stored names: safetensors or PyTorch's .bin, in one file or in shards.

A .bin file is a pickle: it is read by PyTorch's restricted unpickler (`weights_only=True`) or not at all.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from bertpair.errors import CheckpointError, list_faults
from bertpair.settings.strict_json import MAX_BYTES, parse_json, read_json

INDEX_SUFFIX = ".index.json"
WEIGHT_FILES = tuple(  # the first that is there is read
    name + suffix for name in ("model.safetensors", "pytorch_model.bin") for suffix in ("", INDEX_SUFFIX)
)


def find_weights(folder: Path) -> Path | None:
    """The weight file of a model folder, or its index of shards; None where there is neither."""
    # A link that leads nowhere counts: falling back to another file would hide the loss.
    return next((folder / name for name in WEIGHT_FILES if os.path.lexists(folder / name)), None)


def weight_files(path: Path) -> list[Path]:
    """The files that hold what `find_weights` found: itself, or the shards of an index by name."""
    if not path.name.endswith(INDEX_SUFFIX):
        return [path]
    return [path.parent / name for name in sorted(_read_index(path))]


def read_weights(path: Path) -> dict[str, Tensor]:
    """What `find_weights` found, as stored: any number type, perhaps mapped from the file (copy, don't keep).

    Raises CheckpointError naming the file: damaged, incomplete, contradicting its index, or not only tensors.
    """
    if path.name.endswith(INDEX_SUFFIX):
        return _read_shards(path)
    return _reader(path)(path)


def to_float32(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The same in float32. Raises CheckpointError listing what is no float or not finite."""
    converted, faults = {}, []
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            kind = str(tensor.dtype).removeprefix("torch.")
            faults.append(f"{where}: {name!r} is {kind}; expected float16, bfloat16, float32 or float64")
            continue
        converted[name] = tensor.float()
        # The extremes see NaN and infinity alike, and cost a hundredth of isfinite().
        if tensor.numel() and not torch.isfinite(torch.stack(torch.aminmax(converted[name]))).all():
            faults.append(f"{where}: {name!r} holds numbers that are not finite")
    if faults:
        raise CheckpointError(list_faults(faults))
    return converted


def _reader(path: Path) -> Callable[[Path], dict[str, Tensor]]:
    return _read_safetensors if path.name.endswith(".safetensors") else _read_bin


def _read_shards(index: Path) -> dict[str, Tensor]:
    files = _read_index(index)
    tensors: dict[str, Tensor] = {}
    faults = []
    for file, names in files.items():
        shard = index.parent / file
        found = _reader(index)(shard)
        lost, surplus = sorted(names - set(found)), sorted(set(found) - names)
        faults += [f"{shard}: no tensor {name!r}, which {index.name} places there" for name in lost]
        faults += [f"{shard}: {name!r} is there, but not in {index.name}" for name in surplus]
        tensors.update(found)
    if faults:
        raise CheckpointError(list_faults(faults))
    return tensors


def _read_index(index: Path) -> dict[str, set[str]]:
    """Shard file → the names of its tensors; every shard is a file beside the index."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map: expected an object of tensor names to file names")
    suffix = Path(index.name.removesuffix(INDEX_SUFFIX)).suffix
    files: dict[str, set[str]] = {}
    faults = []
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(suffix) or re.search(r"[/\\\0]", file):
            faults.append(f"{index}: {name!r}: found {file!r}; expected a plain file name ending in {suffix}")
        else:
            files.setdefault(file, set()).add(name)
    if not faults:
        lost = [file for file in sorted(files) if not os.path.lexists(index.parent / file)]
        faults = [f"{index.parent}: no {file!r}, a shard that {index.name} names" for file in lost]
    if faults:
        raise CheckpointError(list_faults(faults))
    return files


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            left = os.fstat(file.fileno()).st_size - 8
            if size > min(left, MAX_BYTES):
                raise CheckpointError(
                    f"{path}: no safetensors file, or cut short (a header of {size} bytes where the file has"
                    f" {max(left, 0)} more, and {MAX_BYTES} are allowed)"
                )
            parse_json(file.read(size), f"{path}: header")  # the library lets a name stand there twice
        return load_file(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path}: damaged safetensors file ({error})") from error


def _read_bin(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # the bytes decide what an unpickler raises
        raise CheckpointError(f"{path}: {_why_not_loaded(error)}") from error
    if not isinstance(loaded, dict) or not loaded:
        raise CheckpointError(f"{path}: expected tensors by name, found {type(loaded).__name__}")
    faults = [
        f"{path}: {name!r}: found {type(value).__name__}; expected a name and a dense tensor"
        for name, value in loaded.items()
        if not (isinstance(name, str) and _is_plain(value))
    ]
    if faults:
        raise CheckpointError(list_faults(faults))
    return dict(loaded)


def _is_plain(value: object) -> bool:
    if type(value) not in (Tensor, nn.Parameter):
        return False
    assert isinstance(value, Tensor)
    return value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized


def _why_not_loaded(error: Exception) -> str:
    """PyTorch's own text is not shown: it proposes to load the file without the restriction."""
    asked = re.search(r"GLOBAL ([\w.]+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and asked:
        return (
            f"refused: it holds more than tensors ({asked[1]}), and loading that could run any code;"
            " save the weights as model.safetensors"
        )
    return "damaged, or not a file of PyTorch weights"
