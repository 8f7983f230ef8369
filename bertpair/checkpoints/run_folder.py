"""The folder of one run: what it writes there and when, and what becomes of a write that fails.

The final model comes in one move at the end, so an earlier model in the folder stays usable, and earlier
checkpoints go only once the new run has a whole one. `.run.json` says which run the folder belongs to.
"""

import dataclasses
import json
import logging
import os
import platform
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bertpair.checkpoints import atomic, checkpoint
from bertpair.checkpoints.atomic import Staging, check_free_space, staged_folder
from bertpair.checkpoints.checkpoint import FINAL_READY, checkpoint_folder, load_tensors
from bertpair.checkpoints.lock import LOCK_NAME, RunLock
from bertpair.checkpoints.manifest import MANIFEST_NAME, Manifest, read_manifest, read_verified, verify_folder
from bertpair.errors import CheckpointError, ConfigError, list_faults
from bertpair.settings.files import parse_json, read_json

logger = logging.getLogger(__name__)

RUN_FILE = ".run.json"
METRICS_FILE = "metrics.jsonl"
STATE_FILE = "trainer_state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
SMALL_FILES = 4 << 20  # bytes of a folder's settings and JSON, block sizes included
RESULT_FILES = {
    "predictions.tsv",
    "errors.tsv",
    "figures.json",
    "eval_results.json",
    "eval_results.txt",
    "training_args.yaml",
    METRICS_FILE,
}
RESULT_FILES |= {"curves.png", "confusion_matrix.png"}
STARTED_RUN = {LOCK_NAME, RUN_FILE, METRICS_FILE}
WriteCheckpoint = Callable[[Staging, int], None]  # how long metrics.jsonl is comes with it


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
        """The optimizer's tensors and the random states, verified."""
        return load_tensors(self.folder, OPTIMIZER_FILE, self.manifest)

    def weights(self) -> dict[str, Tensor]:
        """The model's tensors, verified."""
        return load_tensors(self.folder, "model.safetensors", self.manifest)


def read_run_state(folder: Path, manifest: Manifest | None = None) -> RunState:
    """What a whole folder of ours says about its run; CheckpointError if it is damaged or none of ours."""
    manifest = manifest or verify_folder(folder)
    state = parse_json(read_verified(folder, STATE_FILE, manifest), str(folder / STATE_FILE))
    return RunState(folder, manifest, state)


class RunFolder:
    """Holds the folder of one run for this process until it is closed, and writes in it.

    Of several processes of a run one writes. For the others nothing here does anything.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self.run_id = uuid.uuid4().hex[:12]
        self.listeners: list[Callable[[Mapping[str, object]], None]] = []  # to metrics.jsonl's records
        self._lock = RunLock(path)
        self._limit: int | None = None
        self._weights_bytes = self._checkpoint_bytes = 0  # with SMALL_FILES
        self._checkpoint_failed = self._final_failed = False

    def close(self) -> None:
        """Give the folder back."""
        self._lock.release()

    def enter(self) -> None:
        """Take the lock of a folder that is there, and put right what a crash left: half-written folders go,
        and a final model that is staged whole is moved into place."""
        if self._lock.is_held or not self.path.is_dir():
            return
        self._lock.acquire()
        with _forgiving("the staged final model is passed over"), self._writable():
            checkpoint.remove_leftovers(self.path)
            checkpoint.publish_final(self.path)

    @contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(f"output_dir: {self.path} cannot be written: {reason}") from error

    def check_new(self, *, overwrite: bool, instead_of_resume: bool = False) -> None:
        """ConfigError unless a new run may begin here, asked for or for want of one to resume; nothing is
        written."""
        if os.path.lexists(self.path) and not self.path.is_dir():
            what = "is a file" if self.path.exists() else "is a link that leads nowhere"
            raise ConfigError(f"output_dir: {self.path} {what}; a folder is needed")
        place = self.path.absolute()
        existing = next(path for path in (place, *place.parents) if path.exists())
        if not os.access(existing, os.W_OK | os.X_OK) or not existing.is_dir():
            raise ConfigError(f"output_dir: {self.path} cannot be written ({existing})")
        if not overwrite and (found := self._contents()):
            shown = ", ".join([*found[:3], *(["…"] if len(found) > 3 else [])])
            what = f"output_dir: {self.path} is not empty ({shown})"
            anew = "--overwrite_output_dir starts anew in its place"
            other = "--output_dir names another folder"
            if instead_of_resume:
                raise ConfigError(f"{what} and holds no run to resume; {other}; without --resume, {anew}")
            raise ConfigError(f"{what}; --resume goes on with the run in it, {anew}, {other}")

    def _contents(self) -> list[str]:
        names = os.listdir(self.path) if self.path.is_dir() else []
        return sorted(name for name in names if name != LOCK_NAME)

    def find_resume(self, resume: str) -> RunState | None:
        """Where a run goes on: the newest whole checkpoint for `auto`, or the folder that `resume` names.

        None where the run must start from step 0. Damaged checkpoints are named in the log and passed over.
        Raises CheckpointError where checkpoints are there and none is whole, or the named one is not.
        """
        if resume != "auto":
            folder = Path(resume)
            if not folder.is_dir():
                raise CheckpointError(f"resume: {resume} is not a folder; name a checkpoint-N, or say auto")
            if not all((folder / name).is_file() for name in (MANIFEST_NAME, OPTIMIZER_FILE)):
                raise CheckpointError(f"resume: {resume} holds no checkpoint with its {OPTIMIZER_FILE}")
            return read_run_state(folder)
        newest = checkpoint.newest_whole(self.path, self._stored_run_id())
        for fault in newest.faults:
            logger.warning("passed over: %s", fault)
        if newest.path is not None:
            return read_run_state(newest.path, newest.manifest)
        if newest.faults:
            raise CheckpointError(f"{self.path}: no checkpoint is whole\n{list_faults(newest.faults)}")
        return None

    def finished_run(self) -> RunState | None:
        """The final folder's account of the run that the folder belongs to, if that run is over."""
        final = None
        if (self.path / MANIFEST_NAME).is_file():
            with _forgiving("the final model is passed over"):
                final = read_run_state(self.path)
        elif (self.path / STATE_FILE).is_file():
            logger.warning("the final model is passed over: %s has no %s", self.path, MANIFEST_NAME)
        if final is None or self._stored_run_id() not in (None, final.run_id) or "result" not in final.state:
            return None
        checkpoint.discard_others(self.path, final.run_id, is_finished=True)  # had a crash come before that
        return final

    def _stored_run_id(self) -> str | None:
        """Which run the folder belongs to, from .run.json; None where that is missing or unreadable."""
        try:
            run_id = read_json(self.path / RUN_FILE).get("run_id")
        except CheckpointError:
            return None
        return run_id if isinstance(run_id, str) else None

    def may_start_over(self) -> bool:
        """True where a run that was begun here has saved nothing yet: beginning it anew loses nothing.

        What else is there then, it was allowed to replace: nothing but a started run, or an older model.
        """
        if all(name in STARTED_RUN or ".tmp-" in name for name in self._contents()):
            return True
        run_id = self._stored_run_id()
        try:
            return run_id is not None and read_manifest(self.path).run_id != run_id
        except CheckpointError:
            return not os.path.lexists(self.path / MANIFEST_NAME)

    @property
    def save_failed(self) -> bool:
        """The last checkpoint, or the final folder, could not be written."""
        return self._checkpoint_failed or self._final_failed

    def begin(
        self,
        resumed_from: RunState | None,
        *,
        num_kept: int,
        save_total_limit: int | None,
        weights_bytes: int,
        optimizer_bytes: int,
    ) -> None:
        """Take the lock if that was not possible before, see that there is room for the `num_kept`
        checkpoints that stay, and put metrics.jsonl where the run stands."""
        if not self.writes:
            return
        self._limit = save_total_limit
        self._weights_bytes = weights_bytes + SMALL_FILES
        self._checkpoint_bytes = self._weights_bytes + optimizer_bytes
        if resumed_from is not None:
            self.run_id = resumed_from.run_id
        with self._writable():
            if not self._lock.is_held:
                self.path.mkdir(parents=True, exist_ok=True)
                self.enter()
                self.check_new(overwrite=False)  # it was not there before: what is in it is somebody else's
            missing = max(0, num_kept - len(checkpoint.list_checkpoints(self.path)))
            # Those, one more while it is written, and the final model.
            needed = (missing + 1) * self._checkpoint_bytes + self._weights_bytes
            check_free_space(self.path, needed, "this run")
            with open(self.path / METRICS_FILE, "ab") as file:
                length = int(resumed_from.state.get("metrics_bytes", 0)) if resumed_from else 0
                if file.tell() < length:
                    logger.warning("%s is shorter than when it was saved: lines are missing", METRICS_FILE)
                else:
                    file.truncate(length)
                os.fsync(file.fileno())
            said = json.dumps({"run_id": self.run_id}) + "\n"
            atomic.replace_file(self.path / RUN_FILE, said.encode())

    def append_metrics(self, record: Mapping[str, object]) -> None:
        """Add one line to metrics.jsonl; a disk that is full costs the line, not the run."""
        if not self.writes:
            return
        line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
        with _forgiving(f"{METRICS_FILE}: a line could not be written"):
            atomic.append(self.path / METRICS_FILE, line.encode())
        for listen in self.listeners:
            listen(record)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Every record of metrics.jsonl so far."""
        try:
            lines = (self.path / METRICS_FILE).read_text(encoding="utf-8").splitlines()
            return [json.loads(line) for line in lines]
        except (OSError, ValueError) as error:
            logger.warning("%s cannot be read: %s", METRICS_FILE, error)
            return []

    def save_checkpoint(self, step: int, write: WriteCheckpoint, best_step: int | None) -> bool:
        """Have `write` fill checkpoint-`step`, then drop what it makes superfluous; False if that failed."""
        if not self.writes:
            return True
        target = checkpoint_folder(self.path, step)

        def save() -> None:
            check_free_space(self.path, self._checkpoint_bytes, target.name)
            metrics_bytes = atomic.durable_length(self.path / METRICS_FILE)
            meta = {"step": step, "run_id": self.run_id}
            with staged_folder(target, versions=versions(), meta=meta) as staging:
                write(staging, metrics_bytes)

        saved = _attempt(save, target, "the run goes on; the next save tries again")
        self._checkpoint_failed = not saved
        if saved:
            logger.info("saved %s", target)
            with _forgiving("older checkpoints stay"):
                checkpoint.prune(self.path, self._limit, last=step, run_id=self.run_id, best=best_step)
                checkpoint.discard_others(self.path, self.run_id)
        return saved

    def write_final(
        self, write_model: Callable[[Staging], None], state: Mapping[str, Any], files: Mapping[str, bytes]
    ) -> None:
        """Put the final model, `state` and `files` beside it, into the output folder in one move."""
        target = self.path / FINAL_READY

        def write() -> None:
            size = self._weights_bytes + sum(map(len, files.values()))
            check_free_space(self.path, size, "the final model")
            with staged_folder(target, versions=versions(), meta={"run_id": self.run_id}) as staging:
                write_model(staging)
                staging.write_json(STATE_FILE, state)
                for name, data in files.items():
                    staging.write_bytes(name, data)

        moved = _attempt(write, target, "the final model is not there; --resume tries again") and _attempt(
            lambda: checkpoint.publish_final(self.path),
            self.path,
            f"the final model stays in {FINAL_READY}; --resume tries again",
        )
        self._final_failed = not moved
        if self._checkpoint_failed:
            logger.error("%s: the last checkpoint could not be written", self.path)
        if moved:
            with _forgiving("what an earlier run left stays"):
                checkpoint.discard_others(self.path, self.run_id, is_finished=True)
                checkpoint.discard_evaluations(self.path, self.run_id)

    def read_checkpoint(self, step: int) -> RunState:
        """The checkpoint of a step, verified."""
        return read_run_state(checkpoint_folder(self.path, step))

    def newest_whole(self) -> Path | None:
        """This run's newest checkpoint that is whole."""
        return checkpoint.newest_whole(self.path, self.run_id if self.writes else None).path


def _attempt(write: Callable[[], object], target: Path, consequence: str) -> bool:
    """Call `write`, at most twice; False where both failed for the disk's sake."""
    for what_next in ("trying once more", consequence):
        try:
            write()
            return True
        except (OSError, CheckpointError) as error:
            logger.error("%s was not saved: %s; %s", target, error, what_next)
    return False


@contextmanager
def _forgiving(consequence: str) -> Iterator[None]:
    try:
        yield
    except (OSError, CheckpointError) as error:
        logger.warning("%s: %s", consequence, error)


def versions() -> dict[str, str]:
    """What writes a folder, for its manifest."""
    return {"torch": torch.__version__, "python": platform.python_version()}


def drop_weights(path: Path) -> None:
    """Leave of a finished run its figures, predictions, pictures and settings, and what somebody added."""
    with _forgiving("weights that are no longer needed stay"):
        ours = {folder.name for _, folder in checkpoint.list_checkpoints(path)}
        if (path / MANIFEST_NAME).is_file():
            ours |= checkpoint.own_names(path) - RESULT_FILES
        # The list of what is ours goes last.
        for name in [*sorted(ours - {MANIFEST_NAME}), RUN_FILE, LOCK_NAME, MANIFEST_NAME]:
            if os.path.lexists(path / name):
                atomic.remove(path / name)
