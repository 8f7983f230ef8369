"""Weight files of every kind are read as they were written; an index is held to its word."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bertpair.errors import CheckpointError
from bertpair.model.pretrained import find_weights, read_weights, to_float32

Write = Callable[[dict[str, Tensor], Path], None]


def make_tensors() -> dict[str, Tensor]:
    return {
        "a.weight": torch.randn(3, 4),
        "a.bias": torch.randn(4).half(),
        "b.weight": torch.randn(2, 2).bfloat16(),
        "ids": torch.arange(5),
    }


def save_bin(tensors: dict[str, Tensor], path: Path) -> None:
    torch.save(tensors, path)


def save_old_bin(tensors: dict[str, Tensor], path: Path) -> None:
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


def save_shards(folder: Path, tensors: dict[str, Tensor], name: str, write: Write) -> Path:
    """Two shards and their index, as transformers lays them."""
    stem, suffix = name.rsplit(".", 1)
    weight_map = {}
    for i, names in enumerate((list(tensors)[::2], list(tensors)[1::2]), start=1):
        shard = f"{stem}-0000{i}-of-00002.{suffix}"
        write({key: tensors[key] for key in names}, folder / shard)
        weight_map |= dict.fromkeys(names, shard)
    index = folder / f"{name}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize(
    ("name", "write"),
    [("model.safetensors", save_file), ("pytorch_model.bin", save_bin), ("pytorch_model.bin", save_old_bin)],
)
@pytest.mark.parametrize("sharded", [False, True])
def test_what_was_written_is_read(tmp_path: Path, name: str, write: Write, sharded: bool) -> None:
    tensors = make_tensors()
    if sharded:
        path = save_shards(tmp_path, tensors, name, write)
    else:
        path = tmp_path / name
        write(tensors, path)
    assert find_weights(tmp_path) == path
    assert_same(read_weights(path), tensors)


def test_safetensors_are_preferred_and_a_dead_link_is_not_passed_over(tmp_path: Path) -> None:
    assert find_weights(tmp_path) is None
    save_bin(make_tensors(), tmp_path / "pytorch_model.bin")
    assert find_weights(tmp_path) == tmp_path / "pytorch_model.bin"
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "pruned-blob")
    path = find_weights(tmp_path)
    assert path == tmp_path / "model.safetensors"
    with pytest.raises(CheckpointError, match="model.safetensors: cannot be read"):
        read_weights(path)


def test_a_link_to_weights_is_followed(tmp_path: Path) -> None:
    tensors = make_tensors()
    save_file(tensors, tmp_path / "blob")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blob")
    assert_same(read_weights(tmp_path / "model.safetensors"), tensors)


@pytest.mark.parametrize(
    "file",
    [
        "../model-1.safetensors",
        "/etc/model.safetensors",
        "sub/model.safetensors",
        "sub\\model.safetensors",
        "model\0.safetensors",
        "model.bin",
        "",
        "..",
        7,
        None,
        ["model.safetensors"],
    ],
)
def test_an_index_may_name_only_plain_files(tmp_path: Path, file: object) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(CheckpointError, match="expected a plain file name ending in .safetensors"):
        read_weights(index)


def test_a_shard_outside_the_folder_is_not_even_opened(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "secret.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(CheckpointError, match="plain file name"):
        read_weights(index)


@pytest.mark.parametrize("weight_map", [None, [], {}, "model.safetensors", 3])
def test_an_index_without_a_map_is_refused(tmp_path: Path, weight_map: object) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="weight_map: expected an object"):
        read_weights(index)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    index = save_shards(tmp_path, make_tensors(), "model.safetensors", save_file)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no 'model-00002-of-00002.safetensors', a shard that"):
        read_weights(index)


def test_tensors_that_are_not_where_the_index_says_are_listed(tmp_path: Path) -> None:
    tensors = make_tensors()
    index = save_shards(tmp_path, tensors, "model.safetensors", save_file)
    document = json.loads(index.read_text())
    document["weight_map"]["ids"] = "model-00001-of-00002.safetensors"
    document["weight_map"]["ghost"] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(document))
    with pytest.raises(CheckpointError) as caught:
        read_weights(index)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert "model-00001-of-00002.safetensors: no tensor 'ids'" in lines[0]
    assert "model-00002-of-00002.safetensors: no tensor 'ghost'" in lines[1]
    assert "model-00002-of-00002.safetensors: 'ids' is there, but not in" in lines[2]


def test_a_tensor_twice_in_the_index_is_refused(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
    with pytest.raises(CheckpointError, match="the key 'a' stands there twice"):
        read_weights(index)


def test_parameters_in_a_bin_are_tensors(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 3).state_dict(), tmp_path / "pytorch_model.bin")
    torch.save({"a": torch.nn.Parameter(torch.ones(2))}, tmp_path / "other.bin")
    assert list(read_weights(tmp_path / "pytorch_model.bin")) == ["weight", "bias"]
    assert torch.equal(read_weights(tmp_path / "other.bin")["a"], torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_becomes_float32(dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 4).to(dtype)
    found = to_float32({"a": tensor}, "here")["a"]
    assert found.dtype == torch.float32
    assert torch.equal(found, tensor.to(torch.float32))


def test_what_is_no_finite_float_is_listed() -> None:
    tensors = {
        "fine": torch.ones(2),
        "whole": torch.ones(2, dtype=torch.int8),
        "nan": torch.tensor([1.0, float("nan"), 2.0]),
        "inf": torch.tensor([1.0, float("-inf")]).half(),
        "large": torch.tensor([1e300], dtype=torch.float64),
    }
    with pytest.raises(CheckpointError) as caught:
        to_float32(tensors, "here")
    assert str(caught.value).splitlines() == [
        "here: 'whole' is int8; expected float16, bfloat16, float32 or float64",
        "here: 'nan' holds numbers that are not finite",
        "here: 'inf' holds numbers that are not finite",
        "here: 'large' holds numbers that are not finite",
    ]
