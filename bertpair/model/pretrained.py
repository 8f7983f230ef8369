"""Hugging Face model folders ↔ `BertClassifier`: one table of names, read in both directions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bertpair.errors import CheckpointError, list_faults
from bertpair.model.bert import BertClassifier, BertConfig, init_module
from bertpair.model.config import ModelFolder
from bertpair.model.weights import WEIGHT_FILES, find_weights, read_weights, to_float32
from bertpair.runtime import physical_memory

MODULES = {  # ours: Hugging Face's
    "embeddings.words": "bert.embeddings.word_embeddings",
    "embeddings.types": "bert.embeddings.token_type_embeddings",
    "embeddings.positions": "bert.embeddings.position_embeddings",
    "embeddings.norm": "bert.embeddings.LayerNorm",
    "pooler": "bert.pooler.dense",
    "classifier": "classifier",
}
LAYER_MODULES = {  # under layers.N and bert.encoder.layer.N
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "output_norm": "output.LayerNorm",
}
WORD_TABLE = "bert.embeddings.word_embeddings.weight"  # Hugging Face's name of it
HEAD_MODULES = ("pooler", "classifier")  # may be missing from a checkpoint, and are new then


def name_table(model: BertClassifier) -> dict[str, str]:
    """Parameter names: ours → Hugging Face's."""
    modules = dict(MODULES)
    for i in range(model.config.num_hidden_layers):
        modules |= {f"layers.{i}.{a}": f"bert.encoder.layer.{i}.{b}" for a, b in LAYER_MODULES.items()}
    split = (name.rpartition(".") for name, _ in model.named_parameters())
    return {f"{module}.{kind}": f"{modules[module]}.{kind}" for module, _, kind in split}


def state_tensors(model: BertClassifier) -> dict[str, Tensor]:
    """The model's own weights (no copies) under Hugging Face's names."""
    table = name_table(model)
    return {table[name]: parameter.detach() for name, parameter in model.named_parameters()}


@torch.no_grad()
def load_state(model: BertClassifier, tensors: Mapping[str, Tensor], where: str = "weights") -> None:
    """Copy into `model` what `state_tensors` gives; `where` begins each line of an error.

    Raises CheckpointError listing the differences unless names and shapes are the model's own.
    """
    own = state_tensors(model)
    _check_alike(own, tensors, where)
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def load_model(
    folder: ModelFolder,
    *,
    num_labels: int,
    new_head: bool = False,
    from_scratch: bool = False,
    require_head: bool = False,
) -> tuple[BertClassifier, list[str]]:
    """The model of `folder`, in float32 on the CPU, and what its user should know, a line each.

    Weights that are there are always loaded; where there are none, `from_scratch` must be set. What is new
    (a pooler or classifier that the weights lack, or that `new_head` replaces) starts from torch's global
    generator; with `require_head` lacking one is an error: nobody wants a random model's answers.
    Raises CheckpointError listing all that is missing, surplus, of another shape or not finite.
    """
    config = dataclasses.replace(folder.config, num_labels=num_labels)
    file = find_weights(folder.path)
    if file is None and require_head:
        raise CheckpointError(f"{folder.path}: no weights in it ({', '.join(WEIGHT_FILES)}): train it first")
    if file is None:
        return _start_from_scratch(folder.path, config, from_scratch)
    stored, notes = _translate(read_weights(file), file)
    if from_scratch:
        notes.append(f"{file}: loaded; from_scratch is for folders without weights")
    if new_head:
        replaced = [stored.pop(name) for name in _names_under("classifier", stored)]
        notes += [f"{file}: its classifier is replaced by a new one"] if replaced else []
    new = [module for module in HEAD_MODULES if not _names_under(module, stored)]
    if new and require_head:
        raise CheckpointError(f"{file}: holds no {' and no '.join(new)}: train this model first")
    if new:
        notes.append(f"new, to be trained: {', '.join(new)}")
    advice = "config.json does not fit the weights" if require_head else "`new_head: true` trains a new one"
    _check_outputs(stored, num_labels, file, advice)
    return _fill(config, stored, new, str(file)), notes


def _start_from_scratch(
    path: Path, config: BertConfig, from_scratch: bool
) -> tuple[BertClassifier, list[str]]:
    if not from_scratch:
        raise CheckpointError(
            f"{path}: no weights in it ({', '.join(WEIGHT_FILES)});"
            " add them, or set `from_scratch: true` to start from random ones"
        )
    _check_memory(path, config)
    return BertClassifier(config), [f"{path}: no weights in it: starting from random ones"]


def _check_memory(path: Path, config: BertConfig) -> None:
    """CheckpointError where config.json describes weights that this machine has no memory for."""
    with torch.device("meta"), _Unfilled():
        needed = sum(p.numel() * p.element_size() for p in BertClassifier(config).parameters())
    there = physical_memory()
    if there and needed > there:
        raise CheckpointError(
            f"{path / 'config.json'}: describes {needed / 1e9:.3g} GB of weights; this machine has "
            f"{there / 1e9:.3g} GB of memory: is it damaged?"
        )


def _translate(stored: Mapping[str, Tensor], file: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under their present names, and a line about those that are none of ours."""
    tensors: dict[str, Tensor] = {}
    ignored, faults = [], []
    for name, tensor in stored.items():
        present = _present_name(name)
        if name.startswith("cls.") or name.split(".")[-1] == "position_ids":
            ignored.append(name)
        elif present in tensors:
            faults.append(f"{file}: {name!r} stands there under another spelling too ({present!r})")
        else:
            tensors[present] = tensor
    if faults:
        raise CheckpointError(list_faults(faults))
    return tensors, [f"{file}: ignored {', '.join(sorted(ignored))}"] if ignored else []


def _present_name(name: str) -> str:
    """Names of 2018 and of a bare encoder → those of BertForSequenceClassification."""
    if name.split(".")[0] in ("embeddings", "encoder", "pooler"):
        name = "bert." + name
    if name.endswith("LayerNorm.gamma"):
        return name.removesuffix("gamma") + "weight"
    if name.endswith("LayerNorm.beta"):
        return name.removesuffix("beta") + "bias"
    return name


def _names_under(module: str, tensors: Mapping[str, Tensor]) -> list[str]:
    return [name for name in tensors if name.startswith(MODULES[module] + ".")]


def _check_outputs(stored: Mapping[str, Tensor], num_labels: int, file: Path, advice: str) -> None:
    weight = stored.get("classifier.weight")
    if weight is not None and weight.ndim == 2 and len(weight) != num_labels:
        raise CheckpointError(
            f"{file}: its classifier has {len(weight)} outputs, needed are {num_labels}; {advice}"
        )


def _check_alike(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str) -> None:
    faults = [f"{where}: no tensor {name!r}" for name in own if name not in tensors]
    faults += [f"{where}: {name!r} is not part of this model" for name in tensors if name not in own]
    faults += [
        f"{where}: {name!r} has the shape {tuple(tensors[name].shape)}; expected {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if faults:
        raise CheckpointError(list_faults(faults))


class _Unfilled(TorchFunctionMode):
    """Tensors keep no first values: PyTorch loads its compiler to write them, and that wants a folder."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if getattr(func, "__name__", "") in (
            "normal_",
            "uniform_",
            "kaiming_uniform_",
            "zero_",
            "zeros_",
            "ones_",
            "fill_",
        ):
            return args[0] if args else given["tensor"]
        return func(*args, **given)


def _fill(config: BertConfig, stored: Mapping[str, Tensor], new: Sequence[str], where: str) -> BertClassifier:
    """A model with the `stored` weights, and initialised where it is `new`."""
    with torch.device("meta"), _Unfilled():
        own = state_tensors(BertClassifier(config))
    fresh = {
        name: tensor for module in new for name, tensor in own.items() if name in _names_under(module, own)
    }
    _check_alike(own, {**stored, **fresh}, where)
    sound = to_float32(stored, where)
    with _Unfilled():  # all of it is overwritten; to_empty would import torch's compiler
        model = BertClassifier(config)
    for module in new:
        init_module(model.get_submodule(module), config.initializer_range)
    own = state_tensors(model)
    load_state(model, {**sound, **{name: own[name] for name in fresh}}, where)
    return model
