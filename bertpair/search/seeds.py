"""`run_seeds(config, 5)`: one recipe with several seeds, to tell a difference from luck."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from bertpair.checkpoints.atomic import replace_file
from bertpair.checkpoints.lock import RunLock
from bertpair.console import interruptible, lines_shown, stop_flag
from bertpair.errors import ConfigError, StoppedError
from bertpair.evaluation.report import text_table
from bertpair.search.report import spread
from bertpair.search.runs import RUNS_FILE, Figures, Materials, RunsFolder, check_metric, mean_and_deviation
from bertpair.settings.config import Config
from bertpair.settings.contradictions import check_config

RESULTS = "seeds_results.tsv"
OURS = ("seed-*", RESULTS)
COUNTS = ("n",)  # figures that are no measures
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Summary:
    """What several runs measured, each and together."""

    runs: dict[str, Figures]  # by name, in order
    metric: str
    means: dict[str, tuple[float, float | None]]  # mean and standard deviation of each metric
    table: str  # as text
    output_dir: str
    best_model: str | None

    def summary(self) -> dict[str, Any]:
        """The values of train.py's last line."""
        mean, deviation = self.means.get(self.metric, (None, None))
        return {
            "output_dir": self.output_dir,
            "metric": self.metric,
            "mean": mean,
            "std": deviation,
            "best_model": self.best_model,
        }


def run_seeds(config: Config, seeds: int, *, keep_all_weights: bool = False) -> Summary:
    """Train with the seeds `config.seed` and following; results are in `config.output_dir`.

    What was interrupted goes on. Raises what `train` raises; StoppedError says how many seeds are done.
    """
    config = check_config(config, training=True)
    if not 1 <= seeds <= 2**32 - config.seed:
        limit = f"expected at least 1 seed and none above {2**32 - 1}"
        raise ConfigError(f"seeds: {limit}, found {seeds} from {config.seed} on")
    with lines_shown(), interruptible():
        material = Materials().read(config)
        metric = check_metric(config.metric_for_best_model, material)
        if material.dev is None:
            raise ConfigError(
                "several seeds are compared on a dev file: set dev_file, or data_dir with a dev.tsv"
            )
        path = Path(str(config.output_dir))
        lock = RunLock(path)
        if (path / RUNS_FILE).exists():  # before anything in it is read, or deleted to start anew
            lock.acquire()
        try:
            runs = RunsFolder(path, config, metric, keep_all_weights=keep_all_weights, ours=OURS)
            if not lock.is_held:
                lock.acquire()
            for k in range(seeds):
                name, own = f"seed-{config.seed + k}", config.model_copy(update={"seed": config.seed + k})
                try:
                    stop_flag.raise_if_set()
                    figures = runs.run(name, own, material)
                except StoppedError as stopped:
                    done = f"{k} of {seeds} seeds are done; the same command goes on"
                    raise StoppedError(stopped.signum, done) from None
                figure = spread(figures.metrics.get(metric), None)
                logger.info("%s: %s %s (%d of %d)", name, metric, figure, k + 1, seeds)
            return summarise(runs, [f"seed-{config.seed + k}" for k in range(seeds)], RESULTS)
        finally:
            lock.release()


def summarise(runs: RunsFolder, names: list[str], file: str) -> Summary:
    """The table of these runs, which is written to `file` too."""
    done = {name: runs.done[name] for name in names}
    first, *_ = (figures.metrics for figures in done.values())
    metrics = [name for name, value in first.items() if not isinstance(value, str) and name not in COUNTS]
    means = {}
    for metric in metrics:
        values = [figures.metrics[metric] for figures in done.values()]
        if None not in values:
            means[metric] = mean_and_deviation(values)
    rows = [
        [name, *(figures.metrics[metric] for metric in metrics), f"{figures.seconds:.0f}", figures.host]
        for name, figures in done.items()
    ]
    head = ["run", *metrics, "seconds", "host"]
    last = ["mean ± std", *(spread(*means.get(metric, (None, None))) for metric in metrics), "", ""]
    lines = [head, *([row[0], *map(_exact, row[1:])] for row in rows)]
    text = "".join("\t".join(line) + "\n" for line in lines)
    replace_file(runs.path / file, text.encode())
    best = runs.best
    model = None if best is None else runs.path / best
    has_weights = model is not None and (model / "config.json").exists()
    return Summary(
        done,
        runs.metric,
        means,
        text_table(head, [*rows, last]),
        str(runs.path),
        str(model) if has_weights else None,
    )


def _exact(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else repr(value)
