"""Checkpoints and final models, found and read: only what is whole, and only verified bytes.

It knows folders, bytes and tensors by name, not BERT. The final model is staged as `final.ready` and its
files are then linked up into the output folder one by one: until the last is there, `final.ready` stays
whole, and whoever opens the output folder is sent to it.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bertpair.checkpoints.disk import FILE_MODE, fsync_file, fsync_folder, naming, retire_folder
from bertpair.checkpoints.manifest import MANIFEST_NAME, Manifest, read_manifest, read_verified, verify_folder
from bertpair.checkpoints.tensor_file import parse_tensors
from bertpair.errors import CheckpointError, list_faults

logger = logging.getLogger(__name__)

FINAL_READY = "final.ready"
_CHECKPOINT = re.compile("checkpoint-(0|[1-9][0-9]{0,17})")


def read_json(folder: Path, name: str, manifest: Manifest | None = None) -> Any:
    """The value in a verified JSON file of a folder of ours; CheckpointError if it is none."""
    try:
        return json.loads(read_verified(folder, name, manifest))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / name}: not JSON: {str(error) or type(error).__name__}") from error


def load_tensors(
    folder: Path, name: str, manifest: Manifest | None = None, *, finite: bool = True
) -> dict[str, Tensor]:
    """The tensors of a verified safetensors file, on the CPU; CheckpointError says what is wrong.

    The bytes that are parsed are the bytes that were hashed. The tensors are views of one buffer, which
    lives as long as any of them. With `finite`, a NaN or an infinity is an error too.
    """
    data = read_verified(folder, name, manifest)
    try:
        tensors, _ = parse_tensors(data)
    except CheckpointError as error:
        raise CheckpointError(f"{folder / name}: {error}") from error
    if finite:
        _check_finite(tensors, folder / name)
    return tensors


def _check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    floating = {name: t for name, t in tensors.items() if t.is_floating_point() and t.numel()}
    # The extremes of a tensor with a NaN are NaN: one pass without a mask of the tensor's size.
    bad = [name for name, t in floating.items() if not torch.stack(torch.aminmax(t)).isfinite().all()]
    if bad:
        raise CheckpointError(list_faults([f"{path}: {name!r} holds NaN or infinity" for name in bad]))


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return output_dir / f"checkpoint-{step}"


def output_dir_of(folder: Path) -> Path:
    """The output folder that a `checkpoint-N` lies in; any other folder itself."""
    absolute = folder.absolute()
    return absolute.parent if _CHECKPOINT.fullmatch(absolute.name) else folder


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """Step and folder of every `checkpoint-N`, whole or not, in numeric order; links are not followed."""
    found = []
    try:
        entries = list(os.scandir(output_dir))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"{output_dir}: cannot be listed: {error.strerror}") from error
    for entry in entries:
        matched = _CHECKPOINT.fullmatch(entry.name)
        if matched and entry.is_dir(follow_symlinks=False):
            found.append((int(matched[1]), output_dir / entry.name))
    return sorted(found)


class Newest(NamedTuple):
    """The newest whole checkpoint, if there is one, and what is wrong with each newer one."""

    path: Path | None
    manifest: Manifest | None
    faults: list[str]


def newest_whole(output_dir: Path, run_id: str | None = None) -> Newest:
    """The newest checkpoint (of that run, if given) that is whole, checksums included.

    Damaged ones on the way are named in `faults`; without a `path`, `faults` lists every one there is.
    """
    faults: list[str] = []
    for step, path in reversed(list_checkpoints(output_dir)):
        try:
            if run_id is not None and read_manifest(path).run_id != run_id:
                continue
            manifest = verify_folder(path)
        except CheckpointError as error:
            faults.append(str(error))
            continue
        if manifest.meta.get("step", step) == step:
            return Newest(path, manifest, faults)
        faults.append(f"{path}: holds step {manifest.meta['step']}, not the step of its name")
    return Newest(None, None, faults)


def final_folder(output_dir: Path) -> Path:
    """Where the model of an output folder is to be read: `final.ready` if that is whole, else the folder.

    For any other folder that is the folder itself; so whoever opens a model folder asks here first.
    """
    ready = output_dir / FINAL_READY
    if not os.path.lexists(ready):
        return output_dir
    try:
        verify_folder(ready)
    except CheckpointError as error:
        logger.warning("not used: %s", error)
        return output_dir
    return ready


def publish_final(output_dir: Path) -> bool:
    """Move the files of a whole `final.ready` up, manifest last; False if there is none.

    A crash or an OSError at any point leaves `final.ready` whole, and calling again completes the move.
    Files of the output folder that the new model does not have are left alone.
    """
    ready = output_dir / FINAL_READY
    if not os.path.lexists(ready):
        return False
    manifest = verify_folder(ready)
    for entry in manifest.files:
        _place(ready / entry.name, output_dir / entry.name)
    fsync_folder(output_dir)  # the files' new names are durable before the manifest that vouches for them
    _place(ready / MANIFEST_NAME, output_dir / MANIFEST_NAME)
    fsync_folder(output_dir)
    retire_folder(ready)
    return True


def _place(source: Path, target: Path) -> None:
    """Replace `target` by `source`, which stays: through a second name for it, or a copy."""
    if target.exists() and os.path.samefile(source, target):
        return  # placed before a crash; renaming a link over its own file would do nothing and leave it
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    with naming(target):
        temporary.unlink(missing_ok=True)
        try:
            try:
                os.link(source, temporary)
            except OSError:  # a file system without links
                shutil.copyfile(source, temporary)
                os.chmod(temporary, FILE_MODE)
                fsync_file(temporary)
            os.replace(temporary, target)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
