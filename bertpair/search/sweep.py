"""`sweep(config, file)`: try settings, each with several seeds, and find those that do best.

The same call in another process, on this machine or on another that reaches the storage, is one more worker.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock
from optuna.trial import TrialState

from bertpair.checkpoints.atomic import replace_file
from bertpair.console import format_seconds, interruptible, lines_shown, stop_flag
from bertpair.errors import ConfigError, DataError, StoppedError, TrainingError, first_line
from bertpair.evaluation.metrics import best_of, is_better
from bertpair.evaluation.page import REPORT, render
from bertpair.search.report import (
    Trial,
    draw_sweep,
    ranked,
    shown_params,
    spread,
    sweep_page,
    sweep_table,
    sweep_tsv,
)
from bertpair.search.runs import (
    Keep,
    Materials,
    RunsFolder,
    chosen_metric,
    claim_folder,
    leave_figures,
    mean_and_deviation,
    recipe_of,
)
from bertpair.search.space import read_sweep, with_params
from bertpair.search.study import Claim, Study, explained, read_back
from bertpair.settings.config import Config
from bertpair.settings.contradictions import check_config
from bertpair.settings.stored import dump_yaml
from bertpair.training.setup import digest_of

RESULTS, PICTURE, BEST_CONFIG = "sweep_results.tsv", "sweep.png", "best_config.yaml"
PICTURE_SECONDS = 60.0  # between two drawings while trials are run
POLL_SECONDS = 2.0  # while only other workers have trials
MARK = "sweep.json"
OURS = ("sweep.db*", ".sweep.*", "trial-*", MARK, RESULTS, PICTURE, BEST_CONFIG, REPORT)
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class SweepResult:
    """The table of a sweep, best first, and where the best model is."""

    trials: list[Trial]
    metric: str
    table: str  # as text
    output_dir: str
    best_model: str | None  # its folder; None where the best trial ran on another machine

    def summary(self) -> dict[str, Any]:
        """The values of train.py's last line."""
        best = next((trial for trial in self.trials if trial.is_whole), None)
        return {
            "output_dir": self.output_dir,
            "best_settings": best and best.settings,
            "metric": self.metric,
            "mean": best and best.mean,
            "std": best and best.deviation,
            "best_model": self.best_model,
        }


def sweep(
    config: Config, file: str | os.PathLike[str] | Mapping[str, Any], *, keep_all_weights: bool = False
) -> SweepResult:
    """Try what `file` (or the same as a mapping) says, starting from `config`; results are in its output_dir.

    A sweep that was interrupted goes on. Raises ConfigError, DataError or CheckpointError before any work,
    StoppedError with the results of what is finished in place.
    """
    config = check_config(config, training=True)
    with lines_shown(), interruptible():
        worker = _Worker(config, file, keep_all_weights)
        with contextlib.closing(worker.study):
            return worker.work()


class _TimeIsUp(Exception):
    """The sweep's timeout has passed."""


class _Worker:
    """One of the processes that share a sweep."""

    def __init__(
        self, config: Config, file: str | os.PathLike[str] | Mapping[str, Any], keep_all_weights: bool
    ) -> None:
        wanted = read_sweep(file, config.model_copy(update={"overwrite_output_dir": False}))
        self.materials = Materials()
        material = self.materials.read(config)
        if material.dev is None:
            raise ConfigError("a sweep chooses by a dev file: set dev_file, or data_dir with a dev.tsv")
        metric = chosen_metric(wanted.settings.metric or config.metric_for_best_model, material)
        settings = wanted.settings.model_copy(update={"metric": metric})
        self.sweep = dataclasses.replace(wanted, settings=settings)
        self.metric, self.keep_all_weights = metric, keep_all_weights
        self.seeds = [config.seed + k for k in range(settings.seeds)]
        self.folder, self.dev_data = Path(str(config.output_dir)), material.dev.pairs.digest
        of_sweep = settings.model_dump(mode="json", exclude={"trials", "timeout", "storage"})
        digests = {"training_data": digest_of(material.train)[:12], "dev_data": digest_of(material.dev)[:12]}
        recipe = {**recipe_of(config), **of_sweep, **digests}
        overwrite = config.overwrite_output_dir
        recipe = claim_folder(self.folder, MARK, recipe, overwrite=overwrite, ours=OURS)["recipe"]
        identity = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
        self.study = Study(
            self.sweep, self.folder, identity, settings.storage, anew=config.overwrite_output_dir
        )
        self.started = self.drawn = time.monotonic()
        self.num_done_here, self.seconds_here = 0, 0.0

    def work(self) -> SweepResult:
        """Claim trials and run them until all are done, by whatever worker."""
        settings = self.sweep.settings
        said = f"sweep: {self.sweep.num_points} trials of {len(self.seeds)} seeds, {settings.sampler}"
        logger.info("%s; all in %s", said, self.folder)
        with explained(settings.storage):
            try:
                self._run_all()
            except _TimeIsUp:
                logger.info("timeout: %g seconds have passed; the same command goes on", settings.timeout)
            except StoppedError as stopped:
                num_done = len(self._write_results().trials)
                kept = f"{num_done} of {self.sweep.num_points} trials are done; the same command goes on"
                raise StoppedError(stopped.signum, kept) from None
            return self._write_results()

    def _run_all(self) -> None:
        is_waiting = False
        while True:
            self._check_time()
            with self.study.claim() as claim:
                if claim is not None:
                    self._run(claim)
            if claim is not None:
                self._write_results(with_picture=time.monotonic() - self.drawn > PICTURE_SECONDS)
                is_waiting = False
                continue
            others = [trial for trial in self.study.points().values() if not trial.state.is_finished()]
            if not others:
                return
            if not is_waiting:
                logger.info("waiting for %d trials of other workers, to take up what they leave", len(others))
            is_waiting = True
            time.sleep(POLL_SECONDS)

    def _check_time(self) -> None:
        """Raise StoppedError or _TimeIsUp where no further run may start."""
        stop_flag.raise_if_set()
        limit = self.sweep.settings.timeout
        if limit is not None and time.monotonic() - self.started >= limit:
            raise _TimeIsUp

    def _run(self, claim: Claim) -> None:
        started, config = time.monotonic(), with_params(self.sweep.base, claim.params)
        folder = self.study.trial_folder(claim.point)
        keep: Keep = "all" if self.keep_all_weights else "best"
        runs = RunsFolder(folder, config, self.metric, keep=keep, dev_data=self.dev_data)
        values: list[float] = []
        is_behind, failure = False, {}
        for seed in self.seeds:
            self._check_time()
            own = config.model_copy(update={"seed": seed, "overwrite_output_dir": False})
            try:
                figures = runs.run(f"seed-{seed}", own, self.materials.read(own))
            except (ConfigError, DataError, TrainingError) as error:
                logger.error("trial %d, %s: %s", claim.point, shown_params(claim.params), error)
                failure = {"error": first_line(error)}
                break
            value = figures.metrics[self.metric]
            if value is None:
                failure = {"error": f"{self.metric} is not a finite number"}
                break
            values.append(value)
            self.study.report(claim, mean_and_deviation(values)[0], len(values))
            if len(values) < len(self.seeds) and self.sweep.settings.prune and self._is_behind(values):
                is_behind = True
                break
        by_seed = {str(seed): value for seed, value in zip(self.seeds, values, strict=False)}
        seconds = sum(figures.seconds for figures in runs.done.values())
        mean, deviation = mean_and_deviation(values) if values else (None, None)
        result = {"figures": by_seed, "seconds": seconds, **failure}
        self.study.finish(claim, result, None if failure else mean, is_pruned=is_behind)
        self.num_done_here += 1
        self.seconds_here += time.monotonic() - started
        self._say_progress(claim, spread(mean, deviation))

    def _is_behind(self, values: list[float]) -> bool:
        """Whether at least two seeds are done and all are worse than every seed of the best trial."""
        best = next((trial for trial in self._trials() if trial.is_whole), None)
        if best is None or len(values) < 2:
            return False
        pairs = itertools.product(best.figures.values(), values)
        return all(is_better(self.metric, figure, value) for figure, value in pairs)

    def _say_progress(self, claim: Claim, figure: str) -> None:
        trials = self._trials()
        counting = self.study.points().values()
        num_workers = max(1, sum(t.state == TrialState.RUNNING for t in counting) + 1)
        left = sum(not t.state.is_finished() for t in counting)
        parts = [f"trial {claim.point}, {shown_params(claim.params)}: {self.metric} {figure}"]
        parts.append(f"{len(trials)} of {self.sweep.num_points} trials done")
        best = next((trial for trial in trials if trial.is_whole), None)
        if best is not None:
            parts.append(
                f"best so far {spread(best.mean, best.deviation)} with {shown_params(best.settings)}"
            )
        if left:
            seconds = self.seconds_here / self.num_done_here * left / num_workers
            parts.append(f"about {format_seconds(seconds)} left")
        logger.info("%s", "; ".join(parts))

    def _trials(self) -> list[Trial]:
        """Every trial that is over, best first."""
        found = []
        dimensions = {each.name: each for each in self.sweep.space}
        for point, trial in sorted(self.study.points().items()):
            if not trial.state.is_finished():
                continue
            said = trial.user_attrs
            figures = {int(seed): value for seed, value in said["figures"].items()}
            mean, deviation = mean_and_deviation(list(figures.values())) if figures else (None, None)
            status = "done" if trial.state == TrialState.COMPLETE else "stopped early"
            if "error" in said:
                mean, deviation, status = None, None, f"failed: {said['error']}"
            params = {name: read_back(each, trial.params[name]) for name, each in dimensions.items()}
            found.append(
                Trial(point, params, figures, mean, deviation, said["seconds"], said["host"], status)
            )
        return ranked(found, self.metric)

    def _write_results(self, *, with_picture: bool = True) -> SweepResult:
        """The table, the picture and the best settings, as of now; only the best model's weights stay."""
        with FileLock(self.folder / ".sweep.results.lock"):
            trials = self._trials()
            table = sweep_table(trials, self.metric, self.seeds)
            best = next((trial for trial in trials if trial.is_whole), None)
            model, chosen = None, None
            if best is not None:
                changes = {"output_dir": f"{self.folder}-best", "overwrite_output_dir": False}
                chosen = with_params(self.sweep.base, best.settings).model_copy(update=changes)
                replace_file(self.folder / BEST_CONFIG, dump_yaml(chosen).encode())
            if trials:
                replace_file(self.folder / RESULTS, sweep_tsv(trials, self.metric, self.seeds))
            if trials and with_picture:
                self.drawn = time.monotonic()
                replace_file(self.folder / PICTURE, draw_sweep(trials, self.metric, self.sweep.space))
                space, base = self.sweep.space, self.sweep.base
                page = sweep_page(trials, self.metric, self.seeds, space, base, chosen)
                replace_file(self.folder / REPORT, render(page))
            if best is not None:
                name = best_of({f"seed-{seed}": value for seed, value in best.figures.items()}, self.metric)
                path = self.study.trial_folder(best.number) / str(name)
                if (path / "config.json").exists():
                    model = str(path)
                elif with_picture:
                    logger.info("the best model is in %s of host %s", path, best.host)
            for trial in trials:
                if trial is not best and not self.keep_all_weights:
                    for seed in self.seeds:
                        leave_figures(self.study.trial_folder(trial.number) / f"seed-{seed}")
        return SweepResult(trials, self.metric, table, str(self.folder), model)
