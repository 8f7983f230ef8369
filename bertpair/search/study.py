"""The trials of a sweep in Optuna's storage, shared by any number of workers.

Every combination is a *point*, enqueued once as a trial that waits. A worker claims a waiting trial, and the
storage lets only one have it. Two workers that start together may enqueue a point twice: of the trials of a
point the one with the lowest number counts, the others are dropped unseen. A worker that dies leaves a trial
that runs and shows no sign of life; it is marked as failed, and its point is enqueued again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
import socket
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from bertpair.checkpoints.atomic import replacing
from bertpair.checkpoints.lock import RunLock
from bertpair.errors import CheckpointError, ConfigError, first_line
from bertpair.evaluation.metrics import is_better
from bertpair.search.space import Dimension, Params, Sweep

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import optuna
    import sqlalchemy
    from optuna.trial import FrozenTrial, TrialState

SQLITE_FILE = "sweep.db"
BEAT_SECONDS, DEAD_SECONDS = 10, 60  # a sign of life, and how long none may come
SQLITE_WAIT_SECONDS = 60
logger = logging.getLogger(__name__)
optuna.logging.disable_default_handler()
optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclasses.dataclass(frozen=True)
class Claim:
    """A trial that this worker runs."""

    point: int
    params: Params
    trial_id: int


class Study:
    """The trials of one sweep. Raises ConfigError where the storage cannot be used."""

    def __init__(
        self, sweep: Sweep, folder: Path, identity: str, url: str | None, *, anew: bool = False
    ) -> None:
        """`identity` names the sweep among others in the storage; `anew` forgets its trials."""
        self.sweep, self.folder = sweep, folder
        status = os.stat(folder)
        self.host = socket.gethostname()
        self.place = f"{self.host}:{status.st_dev}:{status.st_ino}"  # where this folder's locks say who lives
        directions = optuna.study.StudyDirection
        is_less_better = is_better(str(sweep.settings.metric), 0.0, 1.0)
        direction = directions.MINIMIZE if is_less_better else directions.MAXIMIZE
        self.name = f"bertpair-{identity[:16]}"
        with explained(url):
            self.storage = _open_storage(folder, url)
            if anew:
                with contextlib.suppress(KeyError):
                    optuna.delete_study(study_name=self.name, storage=self.storage)
            self.study = optuna.create_study(
                storage=self.storage, study_name=self.name, direction=direction, load_if_exists=True
            )

    def close(self) -> None:
        """Give the storage's connections back."""
        self.storage.remove_session()
        self.storage.engine.dispose()

    def trials(self) -> list[FrozenTrial]:
        """All of them, by number."""
        return self.study.get_trials(deepcopy=False)

    def points(self) -> dict[int, FrozenTrial]:
        """For each point the trial that counts: it waits, runs or is over."""
        counting: dict[int, FrozenTrial] = {}
        for trial in self.trials():
            if trial.state != TrialState.FAIL or "error" in trial.user_attrs:
                counting.setdefault(trial.user_attrs["point"], trial)
        return counting

    def enqueue(self) -> None:
        """Enqueue each point that has no trial; one that a dead worker had keeps the values it drew."""
        counting = self.points()
        failed = {trial.user_attrs["point"]: trial.params for trial in self.trials() if trial.params}
        missing = [point for point in range(self.sweep.num_points) if point not in counting]
        drawn = self._draw() if missing else []
        for point in missing:
            self.study.enqueue_trial(failed.get(point) or drawn[point], user_attrs={"point": point})

    def _draw(self) -> list[Params]:
        """The values of every point, as Optuna stores them; TPE draws those that are left out here later."""
        sweep, settings = self.sweep, self.sweep.settings

        def as_stored(params: Params) -> Params:
            return {each.name: stored(each, params[each.name]) for each in sweep.space}

        if settings.sampler == "grid":
            return [as_stored(params) for params in sweep.grid()]
        if settings.sampler == "random":
            drawing = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=sweep.base.seed))
            kinds = {each.name: distribution(each) for each in sweep.space}
            return [drawing.ask(kinds).params for _ in range(sweep.num_points)]
        base = {each.name: getattr(sweep.base, each.name) for each in sweep.space}
        is_within = all(each.holds(base[each.name]) for each in sweep.space)
        return [as_stored(base) if is_within else {}, *({} for _ in range(sweep.num_points - 1))]

    def release_dead(self) -> None:
        """Mark trials whose worker has died: here its lock is free, elsewhere no sign of life has come."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if trial.user_attrs.get("place") != self.place:
                continue
            lock = RunLock(self.trial_folder(trial.user_attrs["point"]))
            with contextlib.suppress(CheckpointError):
                lock.acquire()
                self._end(trial._trial_id, TrialState.FAIL)
                lock.release()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optuna.storages.fail_stale_trials(self.study)

    def trial_folder(self, point: int) -> Path:
        """Where a point's runs are."""
        return self.folder / f"trial-{point:03}"

    @contextlib.contextmanager
    def claim(self) -> Iterator[Claim | None]:
        """A waiting trial for this worker alone, its folder locked; None where none waits.

        Left with an exception, the trial is another's to take.
        """
        self.release_dead()
        self.enqueue()
        counting = self.points()
        waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        for trial in sorted(waiting, key=lambda trial: trial.user_attrs["point"]):
            point = trial.user_attrs["point"]
            if counting[point].number != trial.number:
                self._end(trial._trial_id, TrialState.FAIL)
                continue
            folder = self.trial_folder(point)
            folder.mkdir(parents=True, exist_ok=True)
            lock = RunLock(folder)
            try:
                lock.acquire()
            except CheckpointError:  # its worker has it still, and another has found it dead
                continue
            try:
                if self._begin(trial._trial_id):
                    with self._alive(trial._trial_id):
                        yield self._drawn(trial, point)
                    return
            except BaseException:
                self._end(trial._trial_id, TrialState.FAIL)
                raise
            finally:
                lock.release()
        yield None

    def _begin(self, trial_id: int) -> bool:
        try:
            self.storage.record_heartbeat(trial_id)  # before it runs: without one it would never seem dead
            if not self.storage.set_trial_state_values(trial_id, state=TrialState.RUNNING):
                return False
        except optuna.exceptions.UpdateFinishedTrialError:
            return False
        self.storage.set_trial_user_attr(trial_id, "host", self.host)
        self.storage.set_trial_user_attr(trial_id, "place", self.place)
        return True

    def _drawn(self, trial: FrozenTrial, point: int) -> Claim:
        settings, seed = self.sweep.settings, self.sweep.base.seed
        if settings.sampler == "tpe":  # a sampler for each trial, or two workers would draw the same
            num_random = min(10, max(3, self.sweep.num_points // 3))
            self.study.sampler = optuna.samplers.TPESampler(seed=seed + point, n_startup_trials=num_random)
        own = optuna.trial.Trial(self.study, trial._trial_id)
        params = {each.name: read_back(each, suggest(own, each)) for each in self.sweep.space}
        return Claim(point, params, trial._trial_id)

    @contextlib.contextmanager
    def _alive(self, trial_id: int) -> Iterator[None]:
        """Within, a thread gives the storage signs of life."""
        is_over = threading.Event()

        def beat() -> None:
            while True:
                try:
                    self.storage.record_heartbeat(trial_id)
                except Exception as error:  # the next one may succeed
                    logger.debug("no sign of life for trial %d: %s", trial_id, error)
                if is_over.wait(BEAT_SECONDS):
                    return

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()

    def report(self, claim: Claim, mean: float, num_seeds: int) -> None:
        """Tell the storage of the seeds that are done."""
        with self._maybe_lost():
            self.storage.set_trial_intermediate_value(claim.trial_id, num_seeds, mean)

    def finish(
        self, claim: Claim, result: Mapping[str, Any], value: float | None, *, is_pruned: bool
    ) -> None:
        """Store what came out of a trial; without a value it has failed, and `result` has its `error`."""
        state = TrialState.PRUNED if is_pruned else TrialState.COMPLETE
        values = None if value is None else [value]
        with self._maybe_lost():
            for name, each in result.items():
                self.storage.set_trial_user_attr(claim.trial_id, name, each)
            self._end(claim.trial_id, TrialState.FAIL if value is None else state, values)

    def _end(self, trial_id: int, state: TrialState, values: list[float] | None = None) -> None:
        with self._maybe_lost():
            self.storage.set_trial_state_values(trial_id, state=state, values=values)

    @contextlib.contextmanager
    def _maybe_lost(self) -> Iterator[None]:
        try:
            yield
        except optuna.exceptions.UpdateFinishedTrialError:  # another worker took this one for dead
            logger.info("a trial was ended by another worker, which heard nothing of this one")


def distribution(dimension: Dimension) -> optuna.distributions.BaseDistribution:
    """Optuna's name for what a setting may be."""
    if dimension.kind == "list":
        choices = [stored(dimension, value) for value in dimension.values]
        return optuna.distributions.CategoricalDistribution(choices)
    if dimension.kind == "int":
        return optuna.distributions.IntDistribution(int(dimension.low), int(dimension.high))
    return optuna.distributions.FloatDistribution(dimension.low, dimension.high, log=dimension.kind == "log")


def suggest(trial: optuna.trial.Trial, dimension: Dimension) -> Any:
    """The trial's value of a setting, fixed when it was enqueued or drawn by the sampler now."""
    if dimension.kind == "list":
        choices = [stored(dimension, value) for value in dimension.values]
        return trial.suggest_categorical(dimension.name, choices)
    if dimension.kind == "int":
        return trial.suggest_int(dimension.name, int(dimension.low), int(dimension.high))
    is_log = dimension.kind == "log"
    return trial.suggest_float(dimension.name, dimension.low, dimension.high, log=is_log)


def stored(dimension: Dimension, value: Any) -> Any:
    """A value as Optuna keeps it: lists and mappings as text."""
    is_plain = dimension.kind != "list" or value is None or isinstance(value, bool | int | float | str)
    return value if is_plain else repr(value)


def read_back(dimension: Dimension, value: Any) -> Any:
    """The value that `stored` made this of."""
    if dimension.kind != "list":
        return value
    return next(each for each in dimension.values if stored(dimension, each) == value)


def _open_storage(folder: Path, url: str | None) -> optuna.storages.RDBStorage:
    """The database, made if it is not there; each change to a SQLite file waits for the one before it."""
    options: dict[str, Any] = {"heartbeat_interval": BEAT_SECONDS, "grace_period": DEAD_SECONDS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if url is not None:
            return _connect(url, options)
        path = folder.absolute() / SQLITE_FILE
        connect = {"connect_args": {"timeout": SQLITE_WAIT_SECONDS}}
        with FileLock(folder / f".{SQLITE_FILE}.lock", timeout=SQLITE_WAIT_SECONDS):
            if not path.exists():  # made beside its name: its tables do not come in one move
                with replacing(path) as made:
                    optuna.storages.RDBStorage(_sqlite_url(made), connect).engine.dispose()
            storage = optuna.storages.RDBStorage(_sqlite_url(path), connect, **options)
    storage.engine.dispose()
    sqlalchemy.event.listen(storage.engine, "connect", _no_implicit_transactions)
    sqlalchemy.event.listen(storage.engine, "begin", _begin_immediate)
    return storage


def _connect(url: str, options: dict[str, Any], attempts: int = 5) -> optuna.storages.RDBStorage:
    """The tables of a database are made by the first worker; one that tries at the same time tries again."""
    try:
        return optuna.storages.RDBStorage(url, {"pool_pre_ping": True}, **options)
    except (sqlalchemy.exc.IntegrityError, sqlalchemy.exc.ProgrammingError):
        if attempts == 1:
            raise
    time.sleep(1)
    return _connect(url, options, attempts - 1)


def _sqlite_url(path: Path) -> str:
    url = sqlalchemy.URL.create("sqlite", database=str(path)).render_as_string()
    return url.replace("{", "{{").replace("}", "}}")  # Optuna fills braces in


def _no_implicit_transactions(connection: Any, record: Any) -> None:
    connection.isolation_level = None


def _begin_immediate(connection: Any) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


@contextlib.contextmanager
def explained(url: str | None) -> Iterator[None]:
    """Within, a fault of the storage is a ConfigError that names it, without its password."""
    where = "the sweep's SQLite file" if url is None else re.sub(r"//.*@", "//…@", url)
    try:
        yield
    except ImportError as error:
        need = (
            'pip install "bertpair[postgres]"' if (url or "").startswith("postgresql") else first_line(error)
        )
        raise ConfigError(f"storage: {where} needs another package: {need}") from error
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        cause = first_line(error.__cause__ or error)
        raise ConfigError(f"storage: {where} cannot be used: {cause}") from error
