"""Damaged and evil weight files are refused by name, and nothing in them is run."""

import json
import os
import pickle
import random
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_weights import Write, make_tensors, save_bin, save_old_bin

from bertpair.errors import CheckpointError
from bertpair.model.pretrained import read_weights


@pytest.mark.parametrize("write", [save_file, save_bin, save_old_bin])
def test_a_cut_file_is_refused_wherever_it_was_cut(tmp_path: Path, write: Write) -> None:
    path = tmp_path / ("model.safetensors" if write is save_file else "pytorch_model.bin")
    write(make_tensors(), path)
    whole = path.read_bytes()
    for length in [0, 1, 7, 8, 9, 50, *range(100, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        try:
            found = read_weights(path)
        except CheckpointError as error:
            assert str(path) in str(error)
        else:  # the end of a zip archive may be padding
            pytest.fail(f"{length} of {len(whole)} bytes were accepted: {list(found)}")


@pytest.mark.parametrize("write", [save_file, save_bin, save_old_bin])
def test_flipped_bytes_raise_nothing_but_our_error(tmp_path: Path, write: Write) -> None:
    path = tmp_path / ("model.safetensors" if write is save_file else "pytorch_model.bin")
    write(make_tensors(), path)
    whole = path.read_bytes()
    dice = random.Random(5)
    num_refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[dice.randrange(min(len(whole), 600))] ^= 1 << dice.randrange(8)
        path.write_bytes(damaged)
        try:
            read_weights(path)
        except CheckpointError:
            num_refused += 1
    assert num_refused > 20


def write_safetensors(path: Path, header: bytes, data: bytes = b"") -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


ENTRY = '"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'


@pytest.mark.parametrize(
    ("header", "data", "complaint"),
    [
        (f"{{{ENTRY}, {ENTRY}}}", bytes(8), "the key 'a' stands there twice"),
        ("[1, 2]", b"", "expected a JSON object"),
        ("[" * 50_000, b"", "nested too deeply"),
        ("no json", b"", "header: not usable JSON"),
        (f"{{{ENTRY}}}", bytes(7), "damaged"),
        (f"{{{ENTRY}}}", bytes(9), "damaged"),
        (f"{{{ENTRY.replace('F32', 'F99')}}}", bytes(8), "damaged"),
        (f"{{{ENTRY.replace('[2]', '[3]')}}}", bytes(8), "damaged"),
        (f"{{{ENTRY.replace('[2]', '[9223372036854775807, 4]')}}}", bytes(8), "damaged"),
        (f"{{{ENTRY.replace('[0, 8]', '[8, 0]')}}}", bytes(8), "damaged"),
        ('{"a": 5}', b"", "damaged"),
    ],
)
def test_a_contradictory_header_is_refused(tmp_path: Path, header: str, data: bytes, complaint: str) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, header.encode(), data)
    with pytest.raises(CheckpointError, match=complaint) as caught:
        read_weights(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("size", [1 << 20, (1 << 63) + 5, (1 << 64) - 1])
def test_a_header_larger_than_its_file_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", size) + b"{}" * 100)
    with pytest.raises(CheckpointError, match=f"a header of {size} bytes"):
        read_weights(path)


def test_a_header_beyond_all_measure_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 50 << 20))
        file.truncate(60 << 20)  # a hole: takes no space
    with pytest.raises(CheckpointError, match="a header of 52428800 bytes"):
        read_weights(path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"])
def test_garbage_and_folders_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(random.Random(1).randbytes(5000))
    with pytest.raises(CheckpointError, match=name):
        read_weights(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match=f"{name}: cannot be read"):
        read_weights(path)


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["zip", "old", "shard"])
def test_a_pickle_that_would_run_code_is_not_run(tmp_path: Path, kind: str) -> None:
    trap = tmp_path / "ran"
    path = tmp_path / "pytorch_model.bin"
    content = {"a.weight": torch.ones(2), "b.weight": Evil(trap)}
    if kind == "shard":
        torch.save(content, tmp_path / "part.bin")
        path = tmp_path / "pytorch_model.bin.index.json"
        path.write_text(json.dumps({"weight_map": {"a.weight": "part.bin", "b.weight": "part.bin"}}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(
        CheckpointError, match=r"refused: it holds more than tensors \(posix.mkdir\)"
    ) as caught:
        read_weights(path)
    assert not trap.exists()
    assert "weights_only" not in str(caught.value)  # no advice to lower the guard


def test_an_evil_pickle_that_torch_never_writes_is_not_run_either(tmp_path: Path) -> None:
    for protocol in range(3, pickle.HIGHEST_PROTOCOL + 1):
        path = tmp_path / f"{protocol}.bin"
        path.write_bytes(pickle.dumps(Evil(tmp_path / "ran"), protocol))
        with pytest.raises(CheckpointError, match=f"{protocol}.bin: (refused|damaged)"):
            read_weights(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ([torch.ones(2)], "expected tensors by name, found list"),
        (torch.ones(2), "expected tensors by name, found Tensor"),
        ({}, "expected tensors by name"),
        ({"a": 3}, "'a': found int; expected a name and a dense tensor"),
        ({"state_dict": {"a": torch.ones(2)}}, "'state_dict': found dict"),
        ({5: torch.ones(2)}, "5: found Tensor; expected a name"),
        ({"a": torch.ones(2, 2).to_sparse()}, "'a': found Tensor; expected a name and a dense tensor"),
        ({"a": torch.empty(2, device="meta")}, "'a': found Tensor; expected a name and a dense tensor"),
    ],
)
def test_a_bin_of_something_else_is_refused(tmp_path: Path, content: object, complaint: str) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=complaint):
        read_weights(path)
