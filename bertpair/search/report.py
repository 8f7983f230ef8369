"""What came out of many runs: the table, its files, the picture, and the settings that did best."""

from __future__ import annotations

import dataclasses
import itertools
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bertpair.console import program
from bertpair.evaluation.html_report import settings_section
from bertpair.evaluation.metrics import is_better
from bertpair.evaluation.page import Code, Figure, Page, Picture, Section, Table
from bertpair.evaluation.plots import BLUE, MUTED, ORANGE, drawing, png, printable, svg
from bertpair.evaluation.report import ESCAPES, display_width, exact, text_table, tsv
from bertpair.search.space import Dimension, Params
from bertpair.settings.config import Config
from bertpair.settings.fields import as_word
from bertpair.settings.stored import as_flags

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_PANELS = 12
MAX_NUMBERS, MAX_WORDS = 8, 14  # values of a list that have a tick each
MAX_WORD_LENGTH = 20
PANEL_INCHES, CHARACTER_INCHES = 3.0, 0.07


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
        return group, sign * (trial.mean or 0.0), trial.number

    return sorted(trials, key=key)


def spread(mean: float | None, deviation: float | None = None) -> str:
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
            *map(as_word, trial.settings.values()),
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
        cells = [f"{trial.number:03}", *map(_exact, trial.settings.values())]
        cells += map(exact, figures)
        cells += [f"{trial.seconds:.1f}", trial.host, trial.status]
        lines.append([cell.translate(ESCAPES) for cell in cells])
    return tsv(lines)


def _exact(value: Any) -> str:
    return repr(value) if isinstance(value, float) else as_word(value)


def sweep_page(
    trials: Sequence[Trial],
    metric: str,
    seeds: Sequence[int],
    space: Sequence[Dimension],
    base: Config,
    chosen: Config | None,
) -> Page:
    """report.html of a sweep: the table, the picture, and `chosen`, the settings that did best."""
    names = [each.name for each in space]
    head = [
        "trial",
        *names,
        f"{metric}, mean",
        "std",
        *(f"seed {seed}" for seed in seeds),
        "seconds",
        "status",
    ]
    rows = [
        [
            *(f"{trial.number:03}", *map(_cell, trial.settings.values()), trial.mean, trial.deviation),
            *(trial.figures.get(seed) for seed in seeds),
            *(round(trial.seconds), trial.status),
        ]
        for trial in trials
    ]
    picture = Picture(draw_sweep(trials, metric, space, as_svg=True), f"{metric} against each setting")
    sections = [Section("Trials", [picture, Table(head, rows, is_sortable=True)])]
    figures = [Figure("trials", len(trials)), Figure("seeds each", len(seeds))]
    if chosen is not None:
        best = trials[0]  # they are ranked
        note = "" if best.deviation is None else f"± {best.deviation:.4f} over seeds"
        figures.insert(0, Figure(f"best {metric}", best.mean, note))
        settings = [[name, _cell(value)] for name, value in best.settings.items()]
        again = Code(f"{program('train')} {shlex.join(as_flags(chosen))}", "One run with these settings")
        sections.append(Section("Best settings", [Table(["setting", "value"], settings), again]))
    sections.append(settings_section(base))
    folder = Path(str(base.output_dir)).absolute().name
    return Page(folder, f"A sweep: {len(trials):,} trials of {', '.join(names)}.", figures, sections)


def _cell(value: Any) -> Any:
    """A number as one, which can be sorted; anything else as text."""
    return value if type(value) in (int, float) else as_word(value)


def draw_sweep(
    trials: Sequence[Trial], metric: str, space: Sequence[Dimension], *, as_svg: bool = False
) -> bytes:
    """The metric against each of up to MAX_PANELS settings: a point for each trial with an error bar of one
    standard deviation over its seeds, which are small dots; the best has a star."""
    done = [trial for trial in trials if trial.is_whole]
    shown, num_more = space[:MAX_PANELS], len(space[MAX_PANELS:])
    text = "".join(each.name + "".join(map(_tick_word, each.values)) for each in shown)
    with drawing(text) as (figure, no_glyph):
        columns = min(3, len(shown))
        rows = -(-len(shown) // columns)
        figure.set_size_inches(max(4.6, 3.8 * columns), 3.4 * rows)
        figure.set_layout_engine("constrained", h_pad=0.1, w_pad=0.1)
        panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
        for axes, dimension in zip(panels, shown, strict=False):
            _draw_panel(axes, done, dimension, no_glyph)
        for axes in panels[len(shown) :]:
            axes.set_visible(False)
        for axes in panels[::columns]:
            axes.set_ylabel(metric)
        if not done:
            panels[0].set_yticks([])
            panels[0].text(0.5, 0.5, "no trial is done", ha="center", transform=panels[0].transAxes)
        if num_more:
            figure.supxlabel(f"settings that are not shown: {num_more}", size=9, color=MUTED)
        return svg(figure) if as_svg else png(figure)


def _draw_panel(axes: Axes, done: Sequence[Trial], dimension: Dimension, no_glyph: set[str]) -> None:
    is_number = all(type(value) in (int, float) for value in dimension.values)  # so are those of a range
    is_log = is_number and (dimension.kind == "log" or _spans_decades(dimension.values))

    def place(value: Any) -> float:
        return float(value) if is_number else float(dimension.values.index(value))

    edges = [place(value) for value in dimension.edges]
    if is_log and min(edges) == 0:
        axes.set_xscale("symlog", linthresh=min(filter(None, edges)))
    elif is_log:
        axes.set_xscale("log")
    axes.margins(x=0.08)
    axes.update_datalim([(edge, 0.0) for edge in edges], updatey=False)  # also what no trial has tried yet
    places = [place(trial.settings[dimension.name]) for trial in done]
    means = [trial.mean or 0.0 for trial in done]
    bars = [trial.deviation or 0.0 for trial in done]
    axes.errorbar(
        places, means, bars, fmt="o", color=BLUE, ecolor=MUTED, markersize=5, capsize=3, linewidth=1
    )
    for at, trial in zip(places, done, strict=True):
        seeds = list(trial.figures.values())
        axes.plot([at] * len(seeds), seeds, ".", color=BLUE, alpha=0.35, markersize=4, zorder=1)
    if done:  # they are ranked: the first is the best
        axes.plot(places[:1], means[:1], "*", color=ORANGE, markersize=13, markeredgecolor="white", zorder=3)
    if dimension.values and len(dimension.values) <= (MAX_NUMBERS if is_number else MAX_WORDS):
        words = [_tick_word(value) for value in dimension.values]
        drawn = [f"value {k}" if no_glyph & set(word) else word for k, word in enumerate(words, 1)]
        _name_ticks(axes, dict(sorted(zip(edges, drawn, strict=True))))
    elif is_log:
        ticks = [0.0][: min(edges) == 0] + _log_ticks(min(filter(None, edges)), max(edges))
        _name_ticks(axes, {tick: as_word(tick) for tick in ticks})
    elif dimension.kind == "int":
        axes.locator_params(axis="x", integer=True)
    axes.set_title(dimension.name)
    axes.grid(alpha=0.7)


def _spans_decades(values: Sequence[Any]) -> bool:
    """Whether a list of numbers is one that people read on a log axis, such as 0, 1e-4, 1e-3, 1e-2."""
    above = [value for value in values if value > 0]
    return len(above) > 1 and min(values) >= 0 and max(above) >= 10 * min(above)


def _tick_word(value: Any) -> str:
    """A value short enough for a tick: the end of a text, as paths differ there."""
    text = as_word(value)
    text = printable(text, len(text))
    return text if len(text) <= MAX_WORD_LENGTH else f"…{text[1 - MAX_WORD_LENGTH :]}"


def _name_ticks(axes: Axes, words: Mapping[float, str]) -> None:
    """A word at each place, tilted where two would touch."""
    axes.get_xlim()  # brings the limits, and so the places, up to date
    points = axes.transAxes.inverted().transform(axes.transData.transform([(at, 0.0) for at in words]))
    gaps = [PANEL_INCHES * (right - left) for left, right in itertools.pairwise(points[:, 0])]
    widths = [CHARACTER_INCHES * (display_width(word) + 0.7) for word in words.values()]
    needs = [(left + right) / 2 for left, right in itertools.pairwise(widths)]
    is_tight = any(gap < need for gap, need in zip(gaps, needs, strict=True))
    tilt: dict[str, Any] = {"rotation": 40, "rotation_mode": "anchor", "ha": "right", "va": "top"}
    axes.set_xticks(list(words), list(words.values()), **(tilt if is_tight else {}))
    axes.minorticks_off()


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high: more for each power of ten, the fewer of those there are."""
    decades = math.log10(high / low)
    digits = range(1, 10) if decades < 0.7 else (1, 2, 5) if decades < 1.4 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [float(f"{digit}e{power}") for power in powers for digit in digits]
    inside = [tick for tick in ticks if low * 0.999 < tick < high * 1.001]
    return inside if len(inside) > 1 else [low, high]
