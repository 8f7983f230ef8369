"""Hugging Face model folders ↔ our networks: names, weight files, and the hub they come from.

A family's table of names is read in both directions. A .bin file is a pickle: it is read by PyTorch's
restricted unpickler (`weights_only=True`) or not at all. Of a model on the hub only the files that we read
are fetched.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bertpair.errors import CheckpointError, list_faults
from bertpair.model.config import ModelFolder
from bertpair.model.families import Network, family_of
from bertpair.model.family import Family
from bertpair.runtime import physical_memory
from bertpair.settings.files import MAX_JSON_BYTES, parse_json, read_json

logger = logging.getLogger(__name__)

INDEX_SUFFIX = ".index.json"
WEIGHT_FILES = tuple(  # the first that is there is read
    name + suffix for name in ("model.safetensors", "pytorch_model.bin") for suffix in ("", INDEX_SUFFIX)
)
HUB_FILES = [f"{name}.json" for name in ("config", "tokenizer", "tokenizer_config", "special_tokens_map")]
HUB_FILES += ["added_tokens.json", "vocab.txt", "vocab.json", "merges.txt"]
HUB_FILES += ["modules.json", "adapter_config.json"]  # tell what a repository without config.json is
BUFFERS = ("position_ids", "token_type_ids", "inv_freq")  # no weights, and made anew
# In this order, until one kind of weights is there: a repository often holds several.
HUB_WEIGHTS = (
    ("model.safetensors",),
    ("model.safetensors.index.json", "model-*-of-*.safetensors"),
    ("pytorch_model.bin",),
    ("pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"),
)
HUB_NAME = re.compile(r"(?![.-])(?!.*(\.\.|--))([\w.-]{1,96}/)?[\w.-]{1,96}", re.ASCII)
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_FILLING = {"normal_", "uniform_", "kaiming_uniform_", "erfinv_", "mul_", "zero_", "zeros_", "ones_", "fill_"}


class _Unfilled(TorchFunctionMode):
    """Tensors keep no first values: PyTorch loads its compiler to write them, and that wants a folder."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if getattr(func, "__name__", "") in _FILLING:
            return args[0] if args else given["tensor"]
        return func(*args, **given)


def state_tensors(model: Network) -> dict[str, Tensor]:
    """The model's own weights (no copies) under Hugging Face's names.

    Where transformers has no such pooling, the classifier's weight is (1, C, D): it refuses another shape,
    and so cannot answer with other logits.
    """
    family, tensors = family_of(model), {}
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        tensors[f"{_theirs(family, module)}.{kind}"] = parameter.detach()
    if model.config.pooling not in family.poolings:
        name = _theirs(family, "classifier") + ".weight"
        tensors[name] = tensors[name][None]
    return tensors


def word_table_name(model: Network) -> str:
    """Hugging Face's name of the word table."""
    return _theirs(family_of(model), "embeddings.words") + ".weight"


def _theirs(family: Family, module: str) -> str:
    """Hugging Face's name of one of our modules."""
    numbers = iter(_NUMBER.findall(module))
    return re.sub(r"\*", lambda _: next(numbers), family.names[_NUMBER.sub("*", module)])


@torch.no_grad()
def load_state(model: Network, tensors: Mapping[str, Tensor], where: str = "weights") -> None:
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
    read: Callable[[Path], Mapping[str, Tensor]] | None = None,
) -> tuple[Network, list[str]]:
    """The model of `folder`, in float32 on the CPU, and what its user should know, a line each.

    Weights that are there are always loaded; where there are none, `from_scratch` must be set. What is new
    (a pooler or classifier that the weights lack, or that `new_head` replaces) starts from torch's global
    generator; with `require_head` lacking one is an error: nobody wants a random model's answers.
    `read` reads the weight file, by default `read_weights`.
    Raises CheckpointError listing all that is missing, surplus, of another shape or not finite.
    """
    path, file, family = folder.path, find_weights(folder.path), folder.family
    config = folder.config.model_copy(update={"num_labels": num_labels})
    if file is None and (require_head or not from_scratch):
        start = "; add them, or set `from_scratch: true` to start from random ones"
        advice = ": train it first" if require_head else start
        raise CheckpointError(f"{path}: no weights in it ({', '.join(WEIGHT_FILES)}){advice}")
    with torch.device("meta"), _Unfilled():
        own = state_tensors(family.network(config))  # names and shapes alone
    if file is None:
        needed = sum(tensor.numel() * tensor.element_size() for tensor in own.values())
        if 0 < (there := physical_memory()) < needed:
            found = (
                f"describes {needed / 1e9:.3g} GB of weights; this machine has {there / 1e9:.3g} GB of memory"
            )
            raise CheckpointError(f"{path / 'config.json'}: {found}: is it damaged?")
        return family.network(config), [f"{path} has no weights: training starts from random ones"]
    stored, notes = _translate((read or read_weights)(file), file, family)
    if from_scratch:
        notes.append(f"{file}: loaded; from_scratch is for folders without weights")
    classifier = _theirs(family, "classifier") + "."
    if new_head and (old := [name for name in stored if name.startswith(classifier)]):
        notes.append(f"{file}: its classifier is replaced by a new one")
        stored = {name: tensor for name, tensor in stored.items() if name not in old}
    heads = {module: _theirs(family, module) + "." for module in family.heads}
    new = [module for module, prefix in heads.items() if not any(name.startswith(prefix) for name in stored)]
    if new and require_head:
        raise CheckpointError(f"{file}: holds no {' and no '.join(new)}: train this model first")
    if new:
        notes.append(f"new layers, still random: {', '.join(new)}")
    name = classifier + "weight"
    weight = stored.get(name)
    if weight is not None and weight.ndim in (2, 3):
        if weight.shape[-2] != num_labels:
            advice = "`new_head: true` trains a new one"
            why = "config.json does not fit the weights" if require_head else advice
            found = f"its classifier has {weight.shape[-2]} outputs, needed are {num_labels}"
            raise CheckpointError(f"{file}: {found}; {why}")
        if not require_head and weight.numel() == own[name].numel():  # it may be trained with another pooling
            stored[name] = weight.reshape(own[name].shape)
    fresh = tuple(heads[module] for module in new)
    _check_alike({name: each for name, each in own.items() if not name.startswith(fresh)}, stored, str(file))
    sound = to_float32(stored, str(file))
    with _Unfilled():  # all of it is overwritten; to_empty would import torch's compiler
        model = family.network(config)
    for module in new:
        family.init(model, module)
    load_state(model, {**state_tensors(model), **sound})
    return model, notes


def _translate(
    stored: Mapping[str, Tensor], file: Path, family: Family
) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under their present names, and a line about those that are none of ours.

    Names of 2018 and of a bare encoder become those of a classifier of today.
    """
    tensors: dict[str, Tensor] = {}
    ignored, faults = [], []
    prefix = family.prefix
    encoder = [name.removeprefix(prefix) for name in family.names.values() if name.startswith(prefix)]
    bare = tuple({f"{name.partition('.')[0]}." for name in encoder})
    for name, tensor in stored.items():
        present = prefix + name if name.startswith(bare) else name
        present = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", present)
        present = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", present)
        is_head = any(each.startswith(family.ignored) for each in (name, prefix + name))
        if is_head or name.split(".")[-1] in BUFFERS:
            ignored.append(name)
        elif present in tensors:
            faults.append(f"{file}: {name!r} stands there under another spelling too ({present!r})")
        else:
            tensors[present] = tensor
    _raise_all(faults)
    return tensors, [f"{file}: ignored {', '.join(sorted(ignored))}"] if ignored else []


def _check_alike(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str) -> None:
    faults = [f"{where}: no tensor {name!r}" for name in own if name not in tensors]
    faults += [f"{where}: {name!r} is not part of this model" for name in tensors if name not in own]
    faults += [
        f"{where}: {name!r} has the shape {tuple(tensors[name].shape)}; expected {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    _raise_all(faults)


def _raise_all(faults: Sequence[str]) -> None:
    if faults:
        raise CheckpointError(list_faults(faults))


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
    if not path.name.endswith(INDEX_SUFFIX):
        return (_read_safetensors if path.name.endswith(".safetensors") else _read_bin)(path)
    tensors: dict[str, Tensor] = {}
    faults = []
    for file, names in _read_index(path).items():
        shard = path.parent / file
        found = read_weights(shard)
        lost, surplus = sorted(names - set(found)), sorted(set(found) - names)
        faults += [f"{shard}: no tensor {name!r}, which {path.name} places there" for name in lost]
        faults += [f"{shard}: {name!r} is there, but not in {path.name}" for name in surplus]
        tensors |= found
    _raise_all(faults)
    return tensors


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
    _raise_all(faults)
    return converted


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
    lost = [file for file in sorted(files) if not os.path.lexists(index.parent / file)]
    _raise_all(faults or [f"{index.parent}: no {file!r}, a shard that {index.name} names" for file in lost])
    return files


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            left = os.fstat(file.fileno()).st_size - 8
            if size > min(left, MAX_JSON_BYTES):
                found = f"a header of {size} bytes where the file has {max(left, 0)} more"
                allowed = f"{MAX_JSON_BYTES} are allowed"
                raise CheckpointError(f"{path}: no safetensors file, or cut short ({found}, and {allowed})")
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
        why = "damaged, or not a file of PyTorch weights"
        # PyTorch's own text is not shown: it proposes to load the file without the restriction.
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and asked:
            why = f"refused: it holds more than tensors ({asked[1]}), and loading that could run any code; "
            why += "save the weights as model.safetensors"
        raise CheckpointError(f"{path}: {why}") from error
    if not isinstance(loaded, dict) or not loaded:
        raise CheckpointError(f"{path}: expected tensors by name, found {type(loaded).__name__}")
    odd = [name for name, value in loaded.items() if not (isinstance(name, str) and _is_plain(value))]
    expected = "expected a name and a dense tensor"
    _raise_all([f"{path}: {name!r}: found {type(loaded[name]).__name__}; {expected}" for name in odd])
    return loaded


def _is_plain(value: Any) -> bool:
    if type(value) not in (Tensor, nn.Parameter):
        return False
    return (value.layout, value.device.type, value.is_quantized) == (torch.strided, "cpu", False)


def resolve_folder(
    name_or_path: str | Path, *, revision: str | None = None, cache_dir: str | Path | None = None
) -> Path:
    """A folder that is there, else a model of the Hugging Face hub, fetched into its cache (or found there).

    The environment of huggingface_hub holds: HF_HOME, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE. `revision` is a
    branch, tag or commit. Raises CheckpointError with one line that says what to do.
    """
    path, name = os.path.expanduser(name_or_path), str(name_or_path)
    if path and os.path.isdir(path):
        return Path(path)
    if os.path.lexists(path):
        raise CheckpointError(f"{path}: a file; expected a model folder or a name on the Hugging Face hub")
    if not HUB_NAME.fullmatch(name):
        such = (
            "this cannot be a name on the Hugging Face hub, such as google-bert/bert-base-multilingual-cased"
        )
        raise CheckpointError(f"{name_or_path!r}: no such folder (and {such})")
    from huggingface_hub import snapshot_download  # here, as most models are folders and need none of it

    try:
        for weights in HUB_WEIGHTS:
            files = [*HUB_FILES, *weights]
            folder = Path(
                snapshot_download(name, revision=revision, cache_dir=cache_dir, allow_patterns=files)
            )
            if (folder / weights[0]).exists():
                break
    except Exception as error:  # of huggingface_hub, its HTTP client, its download backend, the file system
        raise CheckpointError(f"{name}: no such folder here, and {_explain(error, revision)}") from error
    logger.info("%s: %s", name, folder)
    return folder


def _explain(error: Exception, revision: str | None) -> str:
    """Why the hub gave nothing, and what to do about it, in one line."""
    from huggingface_hub import constants, errors

    hub = "the Hugging Face hub"
    lost = "it is not in the cache while HF_HUB_OFFLINE forbids the network: unset that,"
    if not constants.HF_HUB_OFFLINE:
        lost = f"{hub} cannot be reached and the cache lacks it: try again online,"
    terms = "gives it only to those who accepted its terms: do so there and set HF_TOKEN"
    private = "knows no such model: check the name, or set HF_TOKEN if it is private"
    elsewhere = "or fetch the model on a machine with a network and give its folder"
    reasons: dict[type[Exception], str] = {  # a gated repository's error is a missing one's too
        errors.GatedRepoError: f"{hub} {terms}",
        errors.RepositoryNotFoundError: f"{hub} {private}",
        errors.RevisionNotFoundError: f"{hub} has no revision {revision!r} of this model",
        errors.LocalEntryNotFoundError: f"{lost} {elsewhere}",
    }
    failed = f"fetching it from {hub} failed ({type(error).__name__}: {' '.join(str(error).split()):.300})"
    return next((reason for kind, reason in reasons.items() if isinstance(error, kind)), failed)
