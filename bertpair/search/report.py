"""What came out of many runs: the table, its files, the picture, and the settings that did best."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bertpair.evaluation.metrics import is_better
from bertpair.evaluation.plots import BLUE, MAX_TITLE_LENGTH, MUTED, ORANGE, drawing, png, printable
from bertpair.evaluation.report import ESCAPES, text_table
from bertpair.search.space import Dimension, Params
from bertpair.settings.fields import as_word

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_PANELS = 12
MAX_TICKS = 8  # values of a list that are named; more are numbered


@dataclasses.dataclass(frozen=True)
class Trial:
    """One combination of settings, and what its seeds measured."""

    number: int
    settings: Params
    figures: dict[int, float]  # by seed, as far as they are done
    mean: float | None  # over the seeds; None: it failed
    deviation: float | None  # standard deviation of the sample; None with a single seed
    seconds: float
    host: str
    status: str  # done, stopped early, or failed: and why

    @property
    def is_whole(self) -> bool:
        """Whether all its seeds are done."""
        return self.status == "done"


def ranked(trials: Sequence[Trial], metric: str) -> list[Trial]:
    """Best first: whole trials by their mean, then those that were stopped early, then those that failed."""
    sign = 1 if is_better(metric, 0.0, 1.0) else -1

    def key(trial: Trial) -> tuple[int, float, int]:
        group = 2 if trial.mean is None else int(not trial.is_whole)
        value = sign * trial.mean if trial.mean is not None and math.isfinite(trial.mean) else math.inf
        return group, value, trial.number

    return sorted(trials, key=key)


def spread(mean: float | None, deviation: float | None) -> str:
    """`0.8730 ± 0.0121`"""
    if mean is None:
        return "-"
    return f"{mean:.4f}" if deviation is None else f"{mean:.4f} ± {deviation:.4f}"


def shown_params(params: Params) -> str:
    """`weight_decay 0.01, learning_rate 2e-5`"""
    return ", ".join(f"{name} {as_word(value)}" for name, value in params.items())


def sweep_table(trials: Sequence[Trial], metric: str, seeds: Sequence[int]) -> str:
    """The table for the terminal, best first."""
    names = list(trials[0].settings) if trials else []
    head = [*names, f"{metric}, mean ± std", *(f"seed {seed}" for seed in seeds), "seconds", "host"]
    has_status = any(not trial.is_whole for trial in trials)
    rows = [
        [
            *(as_word(value) for value in trial.settings.values()),
            spread(trial.mean, trial.deviation),
            *(trial.figures.get(seed) for seed in seeds),
            f"{trial.seconds:.0f}",
            trial.host,
            *([trial.status] if has_status else []),
        ]
        for trial in trials
    ]
    return text_table([*head, *(["status"] if has_status else [])], rows)


def sweep_tsv(trials: Sequence[Trial], metric: str, seeds: Sequence[int]) -> bytes:
    """`sweep_results.tsv`: the same with all digits, and the number of each trial's folder."""
    names = list(trials[0].settings) if trials else []
    head = ["trial", *names, f"{metric}_mean", f"{metric}_std", *(f"seed_{seed}" for seed in seeds)]
    lines = [[*head, "seconds", "host", "status"]]
    for trial in trials:
        figures = [trial.mean, trial.deviation, *(trial.figures.get(seed) for seed in seeds)]
        cells = [f"{trial.number:03}", *(as_word(value) for value in trial.settings.values())]
        cells += ["" if each is None else repr(each) for each in figures]
        cells += [f"{trial.seconds:.1f}", trial.host, trial.status]
        lines.append([cell.translate(ESCAPES) for cell in cells])
    return "".join("\t".join(line) + "\n" for line in lines).encode()


def draw_sweep(trials: Sequence[Trial], metric: str, space: Sequence[Dimension]) -> bytes:
    """The metric against each of up to MAX_PANELS settings: a point for each trial with an error bar of one
    standard deviation over its seeds, which are small dots; the best has a star."""
    done = [
        trial for trial in trials if trial.is_whole and trial.mean is not None and math.isfinite(trial.mean)
    ]
    shown = space[:MAX_PANELS]
    names = "".join(printable(each.name, MAX_TITLE_LENGTH) for each in shown)
    with drawing(names) as (figure, _):
        columns = min(3, len(shown))
        rows = -(-len(shown) // columns)
        figure.set_size_inches(max(4.6, 3.8 * columns), 3.4 * rows)
        figure.set_layout_engine("constrained", h_pad=0.1, w_pad=0.1)
        panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
        for axes, dimension in zip(panels, shown, strict=False):
            _draw_panel(axes, done, dimension)
        for axes in panels[len(shown) :]:
            axes.set_visible(False)
        for axes in panels[::columns]:
            axes.set_ylabel(metric)
        return png(figure)


def _draw_panel(axes: Axes, done: Sequence[Trial], dimension: Dimension) -> None:
    values = [trial.settings[dimension.name] for trial in done]
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    is_number = len(numbers) == len(values) > 0
    is_log = is_number and (dimension.kind == "log" or _spans_decades(dimension))
    places = list(map(float, numbers)) if is_number else [float(dimension.values.index(v)) for v in values]
    if is_log:
        least = min((place for place in places if place > 0), default=1.0)
        axes.set_xscale("symlog", linthresh=least) if min(places) == 0 else axes.set_xscale("log")
    means = [trial.mean or 0.0 for trial in done]
    bars = [trial.deviation or 0.0 for trial in done]
    axes.errorbar(
        places, means, bars, fmt="o", color=BLUE, ecolor=MUTED, markersize=5, capsize=3, linewidth=1
    )
    for place, trial in zip(places, done, strict=True):
        seeds = list(trial.figures.values())
        axes.plot([place] * len(seeds), seeds, ".", color=BLUE, alpha=0.35, markersize=4, zorder=1)
    if done:  # they are ranked: the first is the best
        axes.plot(places[:1], means[:1], "*", color=ORANGE, markersize=13, markeredgecolor="white", zorder=3)
    if not is_number or (dimension.kind == "list" and len(dimension.values) <= MAX_TICKS):
        ticks = [float(v) if is_number else float(k) for k, v in enumerate(dimension.values)]
        axes.set_xticks(ticks, [as_word(value) for value in dimension.values])
        axes.minorticks_off()
    elif is_log:
        axes.xaxis.set_major_formatter(lambda value, _: as_word(float(f"{value:.3g}")))
    axes.set_title(dimension.name)
    axes.grid(alpha=0.7)


def _spans_decades(dimension: Dimension) -> bool:
    """Whether a list of numbers is one that people read on a log axis, such as 0, 1e-4, 1e-3, 1e-2."""
    above = [value for value in dimension.values if isinstance(value, float) and value > 0]
    return len(above) > 1 and min(map(float, dimension.values)) >= 0 and max(above) >= 10 * min(above)
