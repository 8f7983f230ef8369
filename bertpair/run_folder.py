"""The folder of one run: may it start there, where does it go on, what it writes and when.

`.run.json` says which run the folder belongs to. Until a run is over, only that file, the lock,
metrics.jsonl and checkpoints are written; the final model comes in one move at the end, so an earlier
model in the same folder stays usable, and earlier checkpoints go only once the new run has a whole one.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import platform
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bertpair.checkpoint import (
    FINAL_READY,
    checkpoint_folder,
    load_tensors,
    newest_whole,
    publish_final,
    read_json,
)
from bertpair.disk import replace_file
from bertpair.errors import CheckpointError, ConfigError, list_faults
from bertpair.lock import LOCK_NAME, RunLock
from bertpair.manifest import MANIFEST_NAME, Manifest, verify_folder
from bertpair.retention import discard_others, prune, remove_leftovers
from bertpair.staging import Staging, staged_folder

logger = logging.getLogger(__name__)

RUN_FILE = ".run.json"
METRICS_FILE = "metrics.jsonl"
STATE_FILE = "trainer_state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
SETTINGS_FILE = "training_args.yaml"
STARTED_RUN = {LOCK_NAME, RUN_FILE, METRICS_FILE}


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What a resume needs beside weights and optimizer: tensors (random states) and JSON values."""

    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]


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


def check_new_run(output_dir: Path, overwrite: bool) -> None:
    """ConfigError unless a new run may begin here; nothing is written."""
    if output_dir.exists() and not output_dir.is_dir():
        raise ConfigError(f"output_dir: {output_dir} is a file; a folder is needed")
    existing = output_dir.absolute()
    while not existing.exists():
        existing = existing.parent
    if not os.access(existing, os.W_OK | os.X_OK) or not existing.is_dir():
        raise ConfigError(f"output_dir: {output_dir} cannot be written ({existing})")
    if not overwrite and (found := _contents(output_dir)):
        shown = ", ".join([*found[:3], *(["…"] if len(found) > 3 else [])])
        raise ConfigError(
            f"output_dir: {output_dir} is not empty ({shown}); "
            "--resume goes on with the run in it, --overwrite_output_dir starts anew in its place, "
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
    publish_final(output_dir)
    if not (output_dir / MANIFEST_NAME).is_file():
        return None
    try:
        final = read_run_state(output_dir, verify_folder(output_dir, allow_extra=True))
    except CheckpointError as error:
        logger.warning("the final model is passed over: %s", error)
        return None
    run_id = _run_id_of(output_dir)
    return final if run_id in (None, final.run_id) and "result" in final.state else None


def _run_id_of(output_dir: Path) -> str | None:
    """Which run the folder belongs to, from .run.json; None where that is missing or unreadable."""
    try:
        run_id = json.loads((output_dir / RUN_FILE).read_bytes())["run_id"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return run_id if isinstance(run_id, str) else None


def only_started(output_dir: Path) -> bool:
    """True where the folder is missing, empty, or holds only what a run writes before its first save."""
    return all(name in STARTED_RUN or ".tmp-" in name for name in _contents(output_dir))


class RunFolder:
    """Writes one run's folder; holds its lock from `begin` to `close`."""

    def __init__(
        self,
        path: Path,
        *,
        run_id: str | None,
        save_total_limit: int | None,
        write_model: Callable[[Staging], None],
        optimizer_tensors: Callable[[], dict[str, Tensor]],
    ) -> None:
        self.path = path
        self.run_id = run_id or uuid.uuid4().hex[:12]
        self.save_failed = False  # the last save, or the final folder
        self._limit = save_total_limit
        self._write_model = write_model
        self._optimizer_tensors = optimizer_tensors
        self._lock = RunLock(path)

    def begin(self, resumed_from: RunState | None) -> None:
        """Take the lock, clear what a crash left, and put metrics.jsonl where the run stands."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            remove_leftovers(self.path)
            state = {} if resumed_from is None else resumed_from.state
            self._cut_metrics(int(state.get("metrics_bytes", 0)))
            said = json.dumps({"run_id": self.run_id}) + "\n"
            replace_file(self.path / RUN_FILE, said.encode())
        except OSError as error:
            raise ConfigError(
                f"output_dir: {self.path} cannot be written: {error.strerror or error}"
            ) from error

    def close(self) -> None:
        """Give the folder back."""
        self._lock.release()

    def _cut_metrics(self, length: int) -> None:
        with open(self.path / METRICS_FILE, "ab") as file:
            if file.tell() < length:
                logger.warning("%s is shorter than when it was saved: lines are missing", METRICS_FILE)
            else:
                file.truncate(length)
            os.fsync(file.fileno())

    def append_metrics(self, record: Mapping[str, object]) -> None:
        """Add one line to metrics.jsonl; a disk that is full costs the line, not the run."""
        line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
        try:
            with open(self.path / METRICS_FILE, "ab") as file:
                file.write(line.encode())
        except OSError as error:
            logger.warning("%s: a line could not be written: %s", METRICS_FILE, error.strerror or error)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Every record of metrics.jsonl so far."""
        try:
            lines = (self.path / METRICS_FILE).read_text(encoding="utf-8").splitlines()
            return [json.loads(line) for line in lines]
        except (OSError, ValueError) as error:
            logger.warning("%s cannot be read: %s", METRICS_FILE, error)
            return []

    def save_checkpoint(self, step: int, snapshot: Callable[[], Snapshot], best_step: int | None) -> None:
        """Write checkpoint-`step`, then drop what it makes superfluous.

        A save that fails is tried once more from the beginning; then the run goes on without it, loudly.
        """
        target = checkpoint_folder(self.path, step)

        def write() -> None:
            taken = snapshot()
            state = {**taken.state, "metrics_bytes": self._sync_metrics()}
            with staged_folder(
                target, versions=versions(), meta={"step": step, "run_id": self.run_id}
            ) as staging:
                self._write_model(staging)
                staging.write_tensors(OPTIMIZER_FILE, {**self._optimizer_tensors(), **taken.tensors})
                staging.write_json(STATE_FILE, state)

        self.save_failed = not _attempt(write, target)
        if self.save_failed:
            return
        logger.info("saved %s", target)
        best = {checkpoint_folder(self.path, best_step)} if best_step is not None else set()
        prune(self.path, self._limit, last=target, run_id=self.run_id, protect=best)
        discard_others(self.path, self.run_id)

    def _sync_metrics(self) -> int:
        """Make metrics.jsonl durable; its length in bytes."""
        with open(self.path / METRICS_FILE, "ab") as file:
            os.fsync(file.fileno())
            return file.tell()

    def write_final(self, state: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        """Put the final model, `files` beside it, into the output folder in one move."""
        target = self.path / FINAL_READY

        def write() -> None:
            with staged_folder(target, versions=versions(), meta={"run_id": self.run_id}) as staging:
                self._write_model(staging)
                staging.write_json(STATE_FILE, state)
                for name, data in files.items():
                    staging.write_bytes(name, data)
            publish_final(self.path)

        self.save_failed = not _attempt(write, target)
        if not self.save_failed:
            discard_others(self.path, self.run_id, is_finished=True)


def _attempt(write: Callable[[], None], target: Path) -> bool:
    """Call `write`, at most twice; False where both failed for the disk's sake."""
    for attempt in ("trying once more", "the run goes on; the next save tries again"):
        try:
            write()
            return True
        except OSError as error:
            logger.error("%s was not saved: %s; %s", target, error, attempt)
    return False


def versions() -> dict[str, str]:
    """What wrote a folder, for its manifest."""
    return {"torch": torch.__version__, "python": platform.python_version()}
