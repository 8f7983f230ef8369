"""The folder of one run: what it writes there and when, and what becomes of a write that fails.

Until a run is over, only .run.json, the lock, metrics.jsonl and checkpoints are written; the final model
comes in one move at the end, so an earlier model in the same folder stays usable, and earlier checkpoints
go only once the new run has a whole one. A save that fails is tried once more in a new temporary folder;
then the run goes on without it, loudly.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from bertpair.checkpoints.checkpoint import FINAL_READY, checkpoint_folder, list_checkpoints, publish_final
from bertpair.checkpoints.disk import (
    SMALL_FILES,
    append,
    check_free_space,
    durable_length,
    free_space_needed,
    replace_file,
)
from bertpair.checkpoints.lock import RunLock
from bertpair.checkpoints.retention import discard_evaluations, discard_others, prune
from bertpair.checkpoints.run_state import (
    METRICS_FILE,
    OPTIMIZER_FILE,
    RUN_FILE,
    STATE_FILE,
    RunState,
    check_new_run,
    enter_folder,
    versions,
)
from bertpair.checkpoints.staging import Staging, staged_folder
from bertpair.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

SETTINGS_FILE = "training_args.yaml"


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What a resume needs beside weights and optimizer: tensors (random states) and JSON values."""

    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a checkpoint is made of, beside its `Snapshot`, and how many bytes that takes."""

    write_model: Callable[[Staging], None]
    optimizer_tensors: Callable[[], dict[str, Tensor]]
    weights_bytes: int
    optimizer_bytes: int


class RunFolder:
    """Writes one run's folder, under the lock that the caller releases."""

    def __init__(
        self,
        path: Path,
        lock: RunLock,
        contents: Contents,
        *,
        run_id: str | None,
        save_total_limit: int | None,
    ) -> None:
        self.path = path
        self.run_id = run_id or uuid.uuid4().hex[:12]
        self._lock = lock
        self._contents = contents
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
            sizes = self._contents.weights_bytes, self._contents.optimizer_bytes
            check_free_space(self.path, free_space_needed(*sizes, kept=missing), "this run")
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

    def save_checkpoint(self, step: int, snapshot: Callable[[], Snapshot], best_step: int | None) -> bool:
        """Write checkpoint-`step`, then drop what it makes superfluous; False where that failed."""
        target = checkpoint_folder(self.path, step)
        contents = self._contents

        def write() -> None:
            size = contents.weights_bytes + contents.optimizer_bytes + SMALL_FILES
            check_free_space(self.path, size, target.name)
            taken = snapshot()
            state = {**taken.state, "metrics_bytes": durable_length(self.path / METRICS_FILE)}
            with staged_folder(
                target, versions=versions(), meta={"step": step, "run_id": self.run_id}
            ) as staging:
                contents.write_model(staging)
                staging.write_tensors(OPTIMIZER_FILE, {**contents.optimizer_tensors(), **taken.tensors})
                staging.write_json(STATE_FILE, state)

        self._checkpoint_failed = not _attempt(write, target, "the run goes on; the next save tries again")
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

    def write_final(self, state: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        """Put the final model, `files` beside it, into the output folder in one move."""
        target = self.path / FINAL_READY

        def write() -> None:
            size = self._contents.weights_bytes + sum(map(len, files.values())) + SMALL_FILES
            check_free_space(self.path, size, "the final model")
            with staged_folder(target, versions=versions(), meta={"run_id": self.run_id}) as staging:
                self._contents.write_model(staging)
                staging.write_json(STATE_FILE, state)
                for name, data in files.items():
                    staging.write_bytes(name, data)

        def move() -> None:
            publish_final(self.path)

        again = "--resume tries again"
        staged = _attempt(write, target, f"the final model is not there; {again}")
        moved = staged and _attempt(move, self.path, f"the final model stays in {FINAL_READY}; {again}")
        self._final_failed = not moved
        if self._checkpoint_failed:
            logger.error("%s: the last checkpoint could not be written", self.path)
        if moved:
            try:
                discard_others(self.path, self.run_id, is_finished=True)
                discard_evaluations(self.path, self.run_id)
            except (OSError, CheckpointError) as error:
                logger.warning("what an earlier run left stays: %s", error)


def _attempt(write: Callable[[], None], target: Path, consequence: str) -> bool:
    """Call `write`, at most twice; False where both failed for the disk's sake."""
    for what_next in ("trying once more", consequence):
        try:
            write()
            return True
        except (OSError, CheckpointError) as error:
            logger.error("%s was not saved: %s; %s", target, error, what_next)
    return False
