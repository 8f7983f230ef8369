"""`run_seeds(config, 5)`: one recipe with several seeds, to tell a difference from luck."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from bertpair.checkpoints.atomic import replace_file
from bertpair.console import interruptible, lines_shown
from bertpair.errors import ConfigError
from bertpair.evaluation.report import exact, text_table, tsv
from bertpair.search.report import spread
from bertpair.search.runs import Figures, Materials, RunsFolder, chosen_metric, mean_and_deviation
from bertpair.settings.config import Config
from bertpair.settings.contradictions import check_config
from bertpair.settings.several import seeds_fault
from bertpair.training.setup import digest_of

RESULTS = "seeds_results.tsv"
OURS = ("seed-*", RESULTS)
COUNTS = ("n",)  # figures that are no measures


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

    What was interrupted goes on. Raises what `train` raises; StoppedError says how many runs are done.
    """
    config = check_config(config, training=True)
    if fault := seeds_fault(config.seed, seeds):
        raise ConfigError(f"seeds: {fault}")
    with lines_shown(), interruptible():
        material = Materials().read(config)
        metric = chosen_metric(config.metric_for_best_model, material)
        if material.dev is None:
            raise ConfigError(
                "several seeds are compared on a dev file: set dev_file, or data_dir with a dev.tsv"
            )
        keep = "all" if keep_all_weights else "best"
        path, numbers = Path(str(config.output_dir)), range(config.seed, config.seed + seeds)
        configs = {f"seed-{seed}": config.model_copy(update={"seed": seed}) for seed in numbers}
        about = {"training_data": digest_of(material.train)[:12], "dev_data": material.dev.pairs.digest}
        with RunsFolder.locked(path, config, metric, keep=keep, ours=OURS, **about) as runs:
            runs.run_all(configs, lambda name: material)
            return summarise(runs, list(configs), RESULTS)


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
    replace_file(runs.path / file, tsv([head, *(map(exact, row) for row in rows)]))
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
