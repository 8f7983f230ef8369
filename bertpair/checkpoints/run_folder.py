"""The folder of one run: what it writes there and when, and what becomes of a write that fails.

Until a run is over, only .run.json, the lock, metrics.jsonl and checkpoints are written; the final model
comes in one move at the end, so an earlier model in the same folder stays usable, and earlier checkpoints
go only once the new run has a whole one. A save that fails is tried once more in a new temporary folder;
then the run goes on without it, loudly.

`.run.json` says which run the folder belongs to. Where a run may start, whether it is over and where it goes
on is asked by the process that holds the folder's lock, after `enter_folder` has put right what a crash left.
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

from bertpair.checkpoints.atomic import (
    SMALL_FILES,
    Staging,
    append,
    check_free_space,
    durable_length,
    free_space_needed,
    replace_file,
    staged_folder,
)
from bertpair.checkpoints.checkpoint import (
    FINAL_READY,
    checkpoint_folder,
    discard_evaluations,
    discard_others,
    list_checkpoints,
    load_tensors,
    newest_whole,
    prune,
    publish_final,
    remove_leftovers,
)
from bertpair.checkpoints.lock import LOCK_NAME, RunLock
from bertpair.checkpoints.manifest import MANIFEST_NAME, Manifest, read_manifest, read_verified, verify_folder
from bertpair.errors import CheckpointError, ConfigError, list_faults
from bertpair.settings.files import parse_json, read_json

logger = logging.getLogger(__name__)


RUN_FILE = ".run.json"
METRICS_FILE = "metrics.jsonl"
STATE_FILE = "trainer_state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
STARTED_RUN = {LOCK_NAME, RUN_FILE, METRICS_FILE}


class RunFolder:
    """Writes one run's folder, under the lock that the caller releases."""

    def __init__(
        self,
        path: Path,
        lock: RunLock,
        *,
        run_id: str | None,
        save_total_limit: int | None,
        weights_bytes: int,
        optimizer_bytes: int,
    ) -> None:
        self.path = path
        self.run_id = run_id or uuid.uuid4().hex[:12]
        self._lock = lock
        self._weights_bytes, self._optimizer_bytes = weights_bytes, optimizer_bytes
        self._limit = save_total_limit
        self._checkpoint_failed = False
        self._final_failed = False

    @property
    def save_failed(self) -> bool:
        """The last checkpoint, or the final folder, could not be written."""
        return self._checkpoint_failed or self._final_failed

    def begin(self, resumed_from: RunState | None, *, checkpoints: int) -> None:
        """Take the lock if that was not possible before, see that there is room for as many `checkpoints`,
        and put metrics.jsonl where the run stands."""
        try:
            self._enter()
            missing = max(0, checkpoints - len(list_checkpoints(self.path)))
            needed = free_space_needed(self._weights_bytes, self._optimizer_bytes, kept=missing)
            check_free_space(self.path, needed, "this run")
            state = {} if resumed_from is None else resumed_from.state
            self._cut_metrics(int(state.get("metrics_bytes", 0)))
            said = json.dumps({"run_id": self.run_id}) + "\n"
            replace_file(self.path / RUN_FILE, said.encode())
        except OSError as error:
            raise ConfigError(
                f"output_dir: {self.path} cannot be written: {error.strerror or error}"
            ) from error

    def _enter(self) -> None:
        if self._lock.is_held:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        enter_folder(self.path, self._lock)
        check_new_run(self.path, overwrite=False)  # it was not there before: what is in it is somebody else's

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
            append(self.path / METRICS_FILE, line.encode())
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

    def save_checkpoint(
        self, step: int, write: Callable[[Staging, int], None], best_step: int | None
    ) -> bool:
        """Have `write` fill checkpoint-`step`, then drop what it makes superfluous; False where that failed.

        `write` is told how long metrics.jsonl is now.
        """
        target = checkpoint_folder(self.path, step)
        meta = {"step": step, "run_id": self.run_id}

        def save() -> None:
            size = self._weights_bytes + self._optimizer_bytes + SMALL_FILES
            check_free_space(self.path, size, target.name)
            metrics_bytes = durable_length(self.path / METRICS_FILE)
            with staged_folder(target, versions=versions(), meta=meta) as staging:
                write(staging, metrics_bytes)

        self._checkpoint_failed = not _attempt(save, target, "the run goes on; the next save tries again")
        if not self._checkpoint_failed:
            logger.info("saved %s", target)
            self._drop_superfluous(target, best_step)
        return not self._checkpoint_failed

    def _drop_superfluous(self, saved: Path, best_step: int | None) -> None:
        best = {checkpoint_folder(self.path, best_step)} if best_step is not None else set()
        try:
            prune(self.path, self._limit, last=saved, run_id=self.run_id, protect=best)
            discard_others(self.path, self.run_id)
        except (OSError, CheckpointError) as error:
            logger.warning("older checkpoints stay: %s", error)

    def write_final(
        self, write_model: Callable[[Staging], None], state: Mapping[str, Any], files: Mapping[str, bytes]
    ) -> None:
        """Put the final model, `state` and `files` beside it, into the output folder in one move."""
        target = self.path / FINAL_READY

        def write() -> None:
            size = self._weights_bytes + sum(map(len, files.values())) + SMALL_FILES
            check_free_space(self.path, size, "the final model")
            with staged_folder(target, versions=versions(), meta={"run_id": self.run_id}) as staging:
                write_model(staging)
                staging.write_json(STATE_FILE, state)
                for name, data in files.items():
                    staging.write_bytes(name, data)

        again = "--resume tries again"
        staged = _attempt(write, target, f"the final model is not there; {again}")
        moved = staged and _attempt(
            lambda: publish_final(self.path), self.path, f"the final model stays in {FINAL_READY}; {again}"
        )
        self._final_failed = not moved
        if self._checkpoint_failed:
            logger.error("%s: the last checkpoint could not be written", self.path)
        if moved:
            try:
                discard_others(self.path, self.run_id, is_finished=True)
                discard_evaluations(self.path, self.run_id)
            except (OSError, CheckpointError) as error:
                logger.warning("what an earlier run left stays: %s", error)


def _attempt(write: Callable[[], object], target: Path, consequence: str) -> bool:
    """Call `write`, at most twice; False where both failed for the disk's sake."""
    for what_next in ("trying once more", consequence):
        try:
            write()
            return True
        except (OSError, CheckpointError) as error:
            logger.error("%s was not saved: %s; %s", target, error, what_next)
    return False


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
    state = parse_json(read_verified(folder, STATE_FILE, manifest), str(folder / STATE_FILE))
    return RunState(folder, manifest, state)


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
        run_id = read_json(output_dir / RUN_FILE).get("run_id")
    except CheckpointError:
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
