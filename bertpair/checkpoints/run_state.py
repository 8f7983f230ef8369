"""What an output folder says about its run: may one start there, is it over, where does it go on.

`.run.json` says which run the folder belongs to. All of it is asked by the process that holds the folder's
lock, after `enter_folder` has put right what a crash left.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bertpair.checkpoints.checkpoint import load_tensors, newest_whole, publish_final, read_json
from bertpair.checkpoints.lock import LOCK_NAME, RunLock
from bertpair.checkpoints.manifest import MANIFEST_NAME, Manifest, read_manifest, verify_folder
from bertpair.checkpoints.retention import discard_others, remove_leftovers
from bertpair.errors import CheckpointError, ConfigError, list_faults

logger = logging.getLogger(__name__)

RUN_FILE = ".run.json"
METRICS_FILE = "metrics.jsonl"
STATE_FILE = "trainer_state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
STARTED_RUN = {LOCK_NAME, RUN_FILE, METRICS_FILE}


@dataclasses.dataclass(frozen=True)
class RunState:
    """What a verified checkpoint, or the final folder of a finished run, says about its run."""

    folder: Path
    manifest: Manifest
    state: Mapping[str, Any]  # trainer_state.json

    @property
    def run_id(self) -> str:
        return self.manifest.run_id or ""

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """optimizer.safetensors: the optimizer's tensors and the random states."""
        return load_tensors(self.folder, OPTIMIZER_FILE, self.manifest)

    def weights(self) -> dict[str, Tensor]:
        """model.safetensors, verified."""
        return load_tensors(self.folder, "model.safetensors", self.manifest)


def read_run_state(folder: Path, manifest: Manifest | None = None) -> RunState:
    """What a whole folder of ours says about its run; CheckpointError if it is damaged or none of ours."""
    manifest = manifest or verify_folder(folder)
    return RunState(folder, manifest, read_json(folder, STATE_FILE, manifest))


def enter_folder(output_dir: Path, lock: RunLock) -> None:
    """Take the lock of a folder that is there, and put right what a crash left: half-written folders go,
    and a final model that is staged whole is moved into place."""
    if not output_dir.is_dir():
        return
    lock.acquire()
    try:
        remove_leftovers(output_dir)
        publish_final(output_dir)
    except OSError as error:
        raise ConfigError(f"output_dir: {output_dir} cannot be written: {error.strerror or error}") from error
    except CheckpointError as error:
        logger.warning("the staged final model is passed over: %s", error)


def check_new_run(output_dir: Path, overwrite: bool, *, instead_of_resume: bool = False) -> None:
    """ConfigError unless a new run may begin here, asked for or for want of one to resume; nothing is
    written."""
    if os.path.lexists(output_dir) and not output_dir.is_dir():
        what = "is a file" if output_dir.exists() else "is a link that leads nowhere"
        raise ConfigError(f"output_dir: {output_dir} {what}; a folder is needed")
    existing = output_dir.absolute()
    while not existing.exists():
        existing = existing.parent
    if not os.access(existing, os.W_OK | os.X_OK) or not existing.is_dir():
        raise ConfigError(f"output_dir: {output_dir} cannot be written ({existing})")
    if not overwrite and (found := _contents(output_dir)):
        shown = ", ".join([*found[:3], *(["…"] if len(found) > 3 else [])])
        what = f"output_dir: {output_dir} is not empty ({shown})"
        if instead_of_resume:
            raise ConfigError(
                f"{what} and holds no run to resume; --output_dir names another folder; "
                "without --resume, --overwrite_output_dir starts anew in its place"
            )
        raise ConfigError(
            f"{what}; --resume goes on with the run in it, --overwrite_output_dir starts anew in its place, "
            "--output_dir names another folder"
        )


def _contents(output_dir: Path) -> list[str]:
    return sorted(p.name for p in output_dir.iterdir() if p.name != LOCK_NAME) if output_dir.is_dir() else []


def find_resume(output_dir: Path, resume: str) -> RunState | None:
    """Where a run goes on: the newest whole checkpoint for `auto`, or the folder that `resume` names.

    None where the run must start from step 0. Damaged checkpoints are named in the log and passed over.
    Raises CheckpointError where checkpoints are there and none is whole, or the named one is not.
    """
    if resume != "auto":
        folder = Path(resume)
        if not folder.is_dir():
            raise CheckpointError(f"resume: {resume} is not a folder; name a checkpoint-N, or say auto")
        if not (folder / MANIFEST_NAME).is_file() or not (folder / OPTIMIZER_FILE).is_file():
            raise CheckpointError(
                f"resume: {resume} holds no checkpoint (no {MANIFEST_NAME} of a checkpoint)"
            )
        return read_run_state(folder)
    newest = newest_whole(output_dir, _run_id_of(output_dir))
    for fault in newest.faults:
        logger.warning("passed over: %s", fault)
    if newest.path is not None:
        return read_run_state(newest.path, newest.manifest)
    if newest.faults:
        raise CheckpointError(f"{output_dir}: no checkpoint is whole\n{list_faults(newest.faults)}")
    return None


def finished_run(output_dir: Path) -> RunState | None:
    """The final folder's account of the run that the folder belongs to, if that run is over."""
    if not (output_dir / MANIFEST_NAME).is_file():
        if (output_dir / STATE_FILE).is_file():
            logger.warning("the final model is passed over: %s has no %s", output_dir, MANIFEST_NAME)
        return None
    try:
        final = read_run_state(output_dir, verify_folder(output_dir))
    except CheckpointError as error:
        logger.warning("the final model is passed over: %s", error)
        return None
    if _run_id_of(output_dir) not in (None, final.run_id) or "result" not in final.state:
        return None
    discard_others(output_dir, final.run_id, is_finished=True)  # a crash may have come before that
    return final


def _run_id_of(output_dir: Path) -> str | None:
    """Which run the folder belongs to, from .run.json; None where that is missing or unreadable."""
    try:
        run_id = json.loads((output_dir / RUN_FILE).read_bytes())["run_id"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return run_id if isinstance(run_id, str) else None


def may_start_over(output_dir: Path) -> bool:
    """True where a run that was begun here has saved nothing yet, so that beginning it anew loses nothing.

    What else is there then, it was allowed to replace: nothing but a started run, or an older one's model.
    """
    if all(name in STARTED_RUN or ".tmp-" in name for name in _contents(output_dir)):
        return True
    run_id = _run_id_of(output_dir)
    if run_id is None:
        return False
    try:
        return read_manifest(output_dir).run_id != run_id
    except CheckpointError:
        return not os.path.lexists(output_dir / MANIFEST_NAME)


def versions() -> dict[str, str]:
    """What writes a folder, for its manifest."""
    return {"torch": torch.__version__, "python": platform.python_version()}
