"""Several runs of one recipe, one after the other: what they share, what is known of them, what they leave.

`runs.json` in their common folder has the figures of every run that is finished. A run that is not finished
goes on from its newest checkpoint when it is asked for again.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from bertpair.checkpoints.atomic import remove, replace_file
from bertpair.checkpoints.checkpoint import RUNS_FILE
from bertpair.checkpoints.lock import LOCK_NAME, RunLock
from bertpair.checkpoints.run_folder import RunFolder, drop_weights
from bertpair.console import check_alone, stop_flag
from bertpair.errors import CheckpointError, ConfigError, StoppedError, list_faults
from bertpair.evaluation.card import discard_card
from bertpair.evaluation.metrics import best_of, finite_or_null
from bertpair.search.report import spread
from bertpair.settings.config import SETTINGS, Config, ModelSettings
from bertpair.settings.data import DataSettings
from bertpair.settings.files import read_json
from bertpair.settings.tasks import check_measured
from bertpair.training.setup import Material, read_material
from bertpair.training.train import train

# Whose lines are for a single run.
_QUIET = ("checkpoints", "console", "data", "evaluation", "model", "training")
_READ = {*DataSettings.model_fields, *ModelSettings.model_fields, "do_train", "do_eval"}
logger = logging.getLogger(__name__)

Keep = Literal["best", "all", "none"]


@dataclasses.dataclass(frozen=True)
class Figures:
    """What a finished run measured with its final weights."""

    metrics: dict[str, Any]
    seconds: float
    host: str


class Materials:
    """Data and weights that runs share: read again only for a run that needs others."""

    def __init__(self) -> None:
        self._key: object = None
        self._material: Material | None = None

    def read(self, config: Config) -> Material:
        """What a run with these settings needs. Raises what `read_material` raises."""
        key = [getattr(config, name) for name in sorted(_READ)]
        if self._material is None or key != self._key:
            self._material = None  # before the next one is read: two may not fit
            self._material, self._key = read_material(config), key
        return self._material


class RunsFolder:
    """A folder with one folder for each run, named `seed-42` or `fold-1`, and `runs.json`."""

    def __init__(
        self,
        path: Path,
        recipe: Config,
        metric: str,
        *,
        keep: Keep,
        ours: Sequence[str] = (),
        dev_data: str | None = None,
        **more: object,
    ) -> None:
        """`keep` says whose weights stay, `dev_data` on which rows all are measured. ConfigError where the
        folder has runs of another recipe, to which `more` belongs. Hold the folder's lock."""
        self.path, self.metric, self.keep, self.dev_data = path, metric, keep, dev_data
        self._recipe = {**recipe_of(recipe), **more}
        overwrite = recipe.overwrite_output_dir
        stored = claim_folder(path, RUNS_FILE, self._recipe, overwrite=overwrite, ours=ours)
        done = {name: Figures(**figures) for name, figures in stored.get("runs", {}).items()}
        # One whose files somebody deleted is done again.
        self.done = {name: each for name, each in done.items() if (path / name / "predictions.tsv").exists()}
        if self.done and stored.get("dev_data") != dev_data:  # an earlier version did not say
            self._write()

    @classmethod
    @contextmanager
    def locked(cls, path: Path, recipe: Config, metric: str, **given: Any) -> Iterator[RunsFolder]:
        """The same, with its lock held within."""
        check_folder(path, RUNS_FILE, overwrite=recipe.overwrite_output_dir)
        path.mkdir(parents=True, exist_ok=True)
        lock = RunLock(path)
        lock.acquire()
        try:
            yield cls(path, recipe, metric, **given)
        finally:
            lock.release()

    @property
    def best(self) -> str | None:
        """The finished run with the best figure; of equals, the first."""
        values = {name: figures.metrics.get(self.metric) for name, figures in self.done.items()}
        return best_of(values, self.metric)

    def run(self, name: str, config: Config, material: Material) -> Figures:
        """The figures of one run, which is trained unless it is finished.

        Raises what `train` raises, and CheckpointError where its last save failed.
        """
        if name in self.done:
            return self.done[name]
        folder, started = self.path / name, time.monotonic()
        each = {"output_dir": str(folder), "overwrite_output_dir": False, "resume": "auto"}
        own = config.model_copy(update=each)
        with one_line_each():
            result = train(own, explicit=set(SETTINGS), material=material)
        gc.collect()  # the model of this run, before the next one is made
        if result.save_failed:
            raise CheckpointError(f"{folder}: the model could not be saved; run the same command again")
        seconds = round(time.monotonic() - started, 1)
        self.done[name] = Figures(finite_or_null(result.metrics), seconds, socket.gethostname())
        self._write()
        self._tidy()
        return self.done[name]

    def run_all(self, configs: Mapping[str, Config], material_of: Callable[[str], Material]) -> None:
        """Every run, by name, one after the other; a StoppedError says how many are done."""
        for number, (name, config) in enumerate(configs.items()):
            try:
                stop_flag.raise_if_set()
                figures = self.run(name, config, material_of(name))
            except StoppedError as stopped:
                done = f"{number} of {len(configs)} runs are done; the same command goes on"
                raise StoppedError(stopped.signum, done) from None
            figure = spread(figures.metrics.get(self.metric))
            logger.info("%s: %s %s (%d of %d)", name, self.metric, figure, number + 1, len(configs))

    def _write(self) -> None:
        runs = {name: dataclasses.asdict(figures) for name, figures in self.done.items()}
        known = {"recipe": self._recipe, "dev_data": self.dev_data, "runs": runs}
        text = json.dumps(known, ensure_ascii=False, indent=1)
        replace_file(self.path / RUNS_FILE, f"{text}\n".encode())

    def _tidy(self) -> None:
        for name in self.done:
            if self.keep == "none" or (self.keep == "best" and name != self.best):
                leave_figures(self.path / name)


def leave_figures(path: Path) -> None:
    """Leave of a finished run what it measured, without its weights."""
    drop_weights(path)
    with suppress(OSError):
        discard_card(path)


def recipe_of(config: Config) -> dict[str, Any]:
    """The settings that a run's figures depend on by more than rounding: workers may differ in the others."""
    values = config.model_dump(mode="json")
    return {name: values[name] for name in SETTINGS if SETTINGS[name].resume not in ("free", "warn")}


def check_folder(path: Path, mark: str, *, overwrite: bool) -> None:
    """ConfigError where a folder cannot be written, or holds something else than several runs."""
    check_alone("several runs")
    RunFolder(path).check_new(overwrite=True)
    found = sorted(each.name for each in path.iterdir() if each.name[0] != ".") if path.is_dir() else []
    if found and mark not in found and not overwrite:
        shown = ", ".join(found[:3]) + (", …" if len(found) > 3 else "")
        advice = "--output_dir names another folder"
        raise ConfigError(f"output_dir: {path} holds something else than these runs ({shown}); {advice}")


def claim_folder(
    path: Path, mark: str, recipe: Mapping[str, Any], *, overwrite: bool, ours: Sequence[str]
) -> dict[str, Any]:
    """Make the folder of several runs, or find it: the file `mark` in it has the recipe, and is returned.

    With `overwrite`, what `ours` (patterns) names is deleted first. ConfigError where the folder holds
    something else, or runs of another recipe; CheckpointError where runs to be deleted are going on.
    """
    check_folder(path, mark, overwrite=overwrite)
    path.mkdir(parents=True, exist_ok=True)
    if overwrite:
        doomed = [found for pattern in (*ours, mark) for found in path.glob(pattern)]
        for each in doomed:
            if (each / LOCK_NAME).exists():
                lock = RunLock(each)
                lock.acquire()
                lock.release()
        for each in doomed:
            remove(each)
    if (path / mark).exists():
        stored = read_json(path / mark)
        check_recipe(stored.get("recipe"), recipe, path)
        return stored
    made = {"recipe": dict(recipe)}
    replace_file(path / mark, f"{json.dumps(made, ensure_ascii=False, indent=1)}\n".encode())
    return made


def chosen_metric(metric: str | None, material: Material) -> str:
    """The metric to choose by, by default the task's first; ConfigError for one that is never measured."""
    chosen = metric or material.source.metrics[0]
    num_labels = None if material.labels is None else len(material.labels)
    check_measured("metric", chosen, num_labels, has_order=material.label_ranks is not None)
    return chosen


def check_recipe(stored: Any, recipe: Mapping[str, Any], where: object) -> None:
    """ConfigError that lists the settings in which runs in `where` differ from the recipe."""
    if stored == recipe:
        return
    before = {name: SETTINGS[name].default for name in recipe if name in SETTINGS}  # new ones are not stored
    before |= stored if isinstance(stored, dict) else {}
    faults = [
        f"{name}: they have {before.get(name)!r}, found {recipe.get(name)!r}"
        for name in {**before, **recipe}
        if before.get(name) != recipe.get(name)
    ]
    if not faults:
        return
    advice = "--output_dir names another folder, --overwrite_output_dir starts anew in its place"
    raise ConfigError(f"{where} has runs with other settings; {advice}\n{list_faults(faults)}")


def mean_and_deviation(values: list[float]) -> tuple[float, float | None]:
    """The mean, and the standard deviation of a sample; None for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


@contextmanager
def one_line_each() -> Iterator[None]:
    """Within, a run logs only its warnings."""
    loggers = [logging.getLogger(f"bertpair.{wing}") for wing in _QUIET]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
