"""A model's name or path → a local folder; names are fetched by huggingface_hub, only the files we read."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, errors

from bertpair.errors import CheckpointError

logger = logging.getLogger(__name__)

SMALL_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
# In this order, until one kind of weights is there: a repository often holds several.
WEIGHTS = (
    ("model.safetensors",),
    ("model.safetensors.index.json", "model-*-of-*.safetensors"),
    ("pytorch_model.bin",),
    ("pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"),
)
HUB_NAME = re.compile(r"([\w.-]{1,96}/)?[\w.-]{1,96}", re.ASCII)


def resolve_folder(
    name_or_path: str | Path, *, revision: str | None = None, cache_dir: str | Path | None = None
) -> Path:
    """A folder that is there, else a model of the Hugging Face hub, fetched into its cache (or found there).

    The environment of huggingface_hub holds: HF_HOME, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE. `revision` is a
    branch, tag or commit. Raises CheckpointError with one line that says what to do.
    """
    name = os.path.expanduser(name_or_path)
    if name and os.path.isdir(name):
        return Path(name)
    if os.path.lexists(name):
        raise CheckpointError(f"{name}: a file; expected a model folder or a name on the Hugging Face hub")
    if not _is_hub_name(str(name_or_path)):
        raise CheckpointError(
            f"{name_or_path!r}: no such folder (and this cannot be a name on the Hugging Face hub,"
            " such as google-bert/bert-base-multilingual-cased)"
        )
    for weights in WEIGHTS:
        folder = _fetch(str(name_or_path), revision, cache_dir, [*SMALL_FILES, *weights])
        if (folder / weights[0]).exists():
            break
    logger.info("%s: %s", name_or_path, folder)
    return folder


def _is_hub_name(name: str) -> bool:
    return bool(HUB_NAME.fullmatch(name)) and name[0] not in ".-" and ".." not in name and "--" not in name


def _fetch(name: str, revision: str | None, cache_dir: str | Path | None, files: list[str]) -> Path:
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, cache_dir=cache_dir, allow_patterns=files
            )
        )
    except Exception as error:  # of huggingface_hub, its HTTP client, its download backend, the file system
        raise CheckpointError(f"{name}: no such folder here, and {_explain(error, revision)}") from error


def _explain(error: Exception, revision: str | None) -> str:
    """Why the hub gave nothing, and what to do about it, in one line."""
    elsewhere = "or fetch the model on a machine with a network and give its folder"
    if isinstance(error, errors.GatedRepoError):
        return (
            "the Hugging Face hub gives it only to those who accepted its terms: do so there and set HF_TOKEN"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the Hugging Face hub knows no such model: check the name, or set HF_TOKEN if it is private"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the Hugging Face hub has no revision {revision!r} of this model"
    if isinstance(error, errors.LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE:
        return f"it is not in the cache while HF_HUB_OFFLINE forbids the network: unset that, {elsewhere}"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return f"the Hugging Face hub cannot be reached and the cache lacks it: try again online, {elsewhere}"
    text = " ".join(str(error).split())
    return f"fetching it from the Hugging Face hub failed ({type(error).__name__}: {text:.300})"
