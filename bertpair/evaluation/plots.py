"""Pictures of a run as PNG bytes: the confusion matrix and the training curves.

Drawn with matplotlib's objects, never pyplot: no global state changes, and the same input gives the same
bytes. matplotlib is imported when first needed: with its list of fonts it costs a second.

Fonts are named by file, so that neither the user's matplotlibrc nor a family of the same name changes a
picture. A font counts only if it has every glyph: a missing one would be drawn as a box, with a warning.
"""

import io
import logging
import math
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties

Point = tuple[float, float]
Line = tuple[str, "FontProperties"]

DPI = 120
MAX_NAME_LENGTH, MAX_TITLE_LENGTH = 28, 60
INK, MUTED, FAINT = "#1f2933", "#66717d", "#c3cad2"
BLUE, ORANGE, GREEN, VIOLET = "#1f5fa8", "#d9730d", "#2b8a57", "#7a5ea8"
# Tried first where DejaVu lacks a glyph: they draw Chinese, Japanese and Korean well.
CJK_FONTS = ("Noto Sans CJK", "Source Han Sans", "PingFang", "Microsoft YaHei", "WenQuanYi")
# They have a glyph for every character, but it is a box or a blank.
PLACEHOLDER_FONTS = ("Last Resort", "LastResort", "Adobe Blank")
MAX_CLASSES = 40
MAX_POINTS = 400  # a longer curve is averaged, with a band from least to greatest


def draw_confusion(matrix: ArrayLike, labels: Sequence[str]) -> bytes:
    """Gold classes down, predicted ones across; in each cell the count and its share of the gold class, which
    also sets the shade: blue where right, orange where wrong. A name that no installed font can draw appears
    as `class k`, k being its id. Beyond MAX_CLASSES, those with the fewest rows become one."""
    counts = np.asarray(matrix, dtype=np.int64)
    share_right = np.trace(counts) / max(1, counts.sum())
    notes = [f"{share_right:.2%} of {counts.sum():,} rows are right", "shade and %: share of the gold class"]
    counts, kept = _largest_classes(counts)
    with quiet_matplotlib():
        shown = [printable(labels[k], MAX_NAME_LENGTH) for k in kept]
        files = find_fonts(shown)
        if not files.keys() >= set(shown):
            notes.append("class k: no installed font draws the name of id k")
        texts = [name if name in files else f"class {k}" for k, name in zip(kept, shown, strict=True)]
        names = [(text, font_of_size(10.5, files.get(text))) for text in texts]
        if len(counts) > len(kept):
            names.append((f"{len(labels) - len(kept)} others", font_of_size(10.5)))
        heading = [("confusion matrix", font_of_size(12)), *((note, font_of_size(9)) for note in notes)]
        return _png(_confusion_figure(counts, names, heading))


def draw_curves(records: Sequence[Mapping[str, Any]], metric: str | None = None) -> bytes:
    """Losses, the watched metric and the learning rate over steps.

    A record has a `step`, perhaps its `epoch`, and in training `loss` and `lr`, in evaluation `eval_loss` and
    `eval_<metric>`. Values that are absent, null or not finite are left out.
    """
    keys = "loss", "eval_loss", f"eval_{metric}", "lr"
    loss, eval_loss, watched, rate = (_series(records, key) for key in keys)
    show_metric = metric not in (None, "loss") and len(watched) > 0
    with quiet_matplotlib():
        figure = _blank_figure()
        ratios = [1.5, 1.2, 0.7] if show_metric else [1.5, 0.7]
        figure.set_size_inches(9.0, 2.1 * sum(ratios) + 0.9)
        figure.set_layout_engine("constrained", h_pad=0.08, w_pad=0.12)
        panels = figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios)
        _plot(panels[0], loss, BLUE, "training")
        _plot(panels[0], eval_loss, ORANGE, "dev", markers=True)
        if show_metric:
            _plot(panels[1], watched, GREEN, "dev", markers=True)
            _mark_best(panels[1], watched[watched[:, 1].argmax()], GREEN)
        elif len(eval_loss):
            _mark_best(panels[0], eval_loss[eval_loss[:, 1].argmin()], ORANGE)
        _plot(panels[-1], rate, VIOLET, "learning rate")
        titles = ["loss", _metric_title(records, metric), "learning rate"]
        for axes, name in zip(panels, titles if show_metric else titles[::2], strict=True):
            _style_panel(axes, name)
        _style_steps(panels[-1], records)
        return _png(figure)


def _largest_classes(counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], list[int]]:
    """The matrix of the MAX_CLASSES classes with most rows and of one more, all others; and the ids kept."""
    C = len(counts)
    if C <= MAX_CLASSES:
        return counts, list(range(C))
    rows = counts.sum(axis=1) + counts.sum(axis=0)
    kept = np.sort(np.argsort(-rows, kind="stable")[:MAX_CLASSES])
    place = np.full(C, MAX_CLASSES)
    place[kept] = np.arange(MAX_CLASSES)
    condensed = np.zeros((MAX_CLASSES + 1, MAX_CLASSES + 1), dtype=np.int64)
    np.add.at(condensed, (place[:, None], place[None, :]), counts)
    return condensed, kept.tolist()


def _confusion_figure(counts: NDArray[np.int64], names: Sequence[Line], heading: Sequence[Line]) -> "Figure":
    """Sized to what it holds: cells of one size, and around them as much room as the names need."""
    figure = _blank_figure()
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    cell = _cell_inches(counts)
    _fill_cells(axes, counts, cell)
    left, bottom, right = _write_names(axes, names, counts.sum(axis=1), cell)
    top, side = 0.52 + 0.2 * len(heading), cell * len(names)
    width = max(left + side + right, max(text_inches(*line) for line in heading) + 0.5)
    height = bottom + side + top
    figure.set_size_inches(width, height)
    axes.set_position((left / width, bottom / height, side / width, side / height))
    for i, (line, font) in enumerate(heading):
        y = 1 - (0.27 + 0.21 * i) / height
        figure.text(0.2 / width, y, line, font=font, color=MUTED if i else INK, va="center", parse_math=False)
    return figure


def _cell_inches(counts: NDArray[np.int64]) -> float:
    """The side of a cell: smaller the more classes, but with room for the longest count in 6.5 points."""
    return float(max(0.46, min(1.25, 7.2 / len(counts)), 6.5 / 72 * _count_ems(counts)))


def _count_ems(counts: NDArray[np.int64]) -> float:
    """The longest count's width with some air, in units of its font size."""
    return 0.75 * len(f"{counts.max():,}")


def _fill_cells(axes: "Axes", counts: NDArray[np.int64], cell: float) -> None:
    C = len(counts)
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    right = np.eye(C, dtype=bool)
    shade = np.where(right, shares, np.sqrt(shares))  # errors are rare: the root lets them be seen
    full = np.where(right[..., None], _rgb(BLUE), _rgb(ORANGE))
    axes.imshow(1 - shade[..., None] * (1 - full), aspect="auto", interpolation="nearest")
    for edge in np.arange(C + 1) - 0.5:
        axes.axhline(edge, color=FAINT, linewidth=0.6, clip_on=False)
        axes.axvline(edge, color=FAINT, linewidth=0.6, clip_on=False)
    axes.set_axis_off()
    size = min(15.0, 72 * cell * min(0.28, 1 / _count_ems(counts)))
    count_font, share_font = font_of_size(size), font_of_size(0.74 * size)
    for row, column in np.ndindex(C, C):
        count = int(counts[row, column])
        ink = "white" if shade[row, column] > 0.7 else INK
        if count:
            share = _percent(float(shares[row, column]), brief=cell < 0.6)
            _write(axes, f"{count:,}", count_font, (column, row), (0, 0.55 * size), color=ink)
            _write(axes, share, share_font, (column, row), (0, -0.75 * size), color=ink)
        elif C <= 12:
            _write(axes, "0", count_font, (column, row), (0, 0), color=FAINT)


def _percent(share: float, brief: bool) -> str:
    if share == 1:
        return "100%"
    if not brief:
        return f"{share:.1%}"
    return "<1%" if share < 0.005 else f"{share:.0%}"


def _write_names(
    axes: "Axes", names: Sequence[Line], totals: NDArray[np.int64], cell: float
) -> tuple[float, float, float]:
    """Class names and row totals around the cells; the margins they need, left, bottom, right, in inches."""
    last, small = len(names) - 0.5, font_of_size(9)
    longest = max(text_inches(*name) for name in names)
    level = longest < 0.92 * cell
    tilt: dict[str, Any] = {} if level else {"rotation": 45, "rotation_mode": "anchor", "ha": "right"}
    for k, (name, font) in enumerate(names):
        _write(axes, name, font, (-0.5, k), (-7, 0), ha="right")
        _write(axes, name, font, (k, last), (0, -8), va="top", **tilt)
        _write(axes, f"{totals[k]:,}", small, (last, k), (8, 0), ha="left", color=MUTED)
    below = 0.25 if level else longest * math.sqrt(0.5) + 0.25
    _write(axes, "gold", small, (-0.5, -0.5), (-7, 8), ha="right", color=MUTED)
    _write(axes, "rows", small, (last, -0.5), (8, 8), ha="left", color=MUTED)
    _write(axes, "predicted", small, (last / 2 - 0.25, last), (0, -72 * below - 8), color=MUTED)
    widest = max(text_inches(f"{total:,}", small) for total in (*totals, 1000))
    return longest + 0.35, below + 0.4, widest + 0.35


def _write(axes: "Axes", text: str, font: "FontProperties", at: Point, offset: Point, **style: Any) -> None:
    """Text at a point of the axes, moved by an offset in points; "$" is a dollar, not mathematics."""
    style = {"ha": "center", "va": "center", "color": INK, **style}
    style |= {"textcoords": "offset points", "annotation_clip": False, "parse_math": False}
    axes.annotate(text, at, offset, font=font, **style)


def _series(records: Sequence[Mapping[str, Any]], key: str) -> NDArray[np.float64]:
    """(step, value) rows of the records that have this key."""
    pairs = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    points = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return points[np.isfinite(points[:, 1])]


def _plot(axes: "Axes", points: NDArray[np.float64], color: str, name: str, markers: bool = False) -> None:
    if not len(points):
        return
    if len(points) > MAX_POINTS:
        groups = np.array_split(points, MAX_POINTS)
        low, high = (np.array([edge(group[:, 1]) for group in groups]) for edge in (np.min, np.max))
        points = np.array([group.mean(axis=0) for group in groups])
        axes.fill_between(points[:, 0], low, high, color=color, alpha=0.18, linewidth=0)
    marker = "o" if len(points) == 1 or (markers and len(points) <= 60) else None
    axes.plot(points[:, 0], points[:, 1], color=color, label=name, linewidth=1.6, marker=marker, markersize=4)


def _mark_best(axes: "Axes", best: NDArray[np.float64], color: str) -> None:
    step, value = best
    axes.plot([step], [value], color=color, marker="*", markersize=13, markeredgecolor="white")
    text = f"best {value:.4f} at step {step:,.0f}"
    axes.set_title(text, loc="right", font=font_of_size(9), color=color)


def _metric_title(records: Sequence[Mapping[str, Any]], metric: str | None) -> str:
    """The metric, and which label f1 was last of, if a font can draw its name."""
    labels = [record["eval_positive_label"] for record in records if record.get("eval_positive_label")]
    title = printable(f"f1 of {labels[-1]}", MAX_TITLE_LENGTH) if metric == "f1" and labels else str(metric)
    return title if find_fonts([title]) else str(metric)


def _style_panel(axes: "Axes", name: str) -> None:
    font = font_of_size(11, find_fonts([name]).get(name))
    axes.set_title(name, loc="left", font=font, color=INK, parse_math=False)
    axes.grid(color=FAINT, linewidth=0.5, alpha=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=MUTED, labelsize=9, length=3)
    axes.ticklabel_format(useOffset=False)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(frameon=False, prop=font_of_size(9), labelcolor=INK)


def _style_steps(panel: "Axes", records: Sequence[Mapping[str, Any]]) -> None:
    """The learning rate's own axis, and under it steps and epochs."""
    from matplotlib.ticker import MaxNLocator

    panel.set_ylim(bottom=0)
    panel.yaxis.set_major_formatter(lambda rate, _: f"{rate:g}".replace("e-0", "e-"))
    panel.set_xlabel("step", font=font_of_size(9), color=MUTED)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    panel.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    last = next((record for record in reversed(records) if record.get("epoch") and record["step"]), None)
    if last is not None:
        steps_per_epoch = last["step"] / last["epoch"]
        turn = (lambda step: step / steps_per_epoch), (lambda epoch: epoch * steps_per_epoch)
        epochs = panel.secondary_xaxis(-0.45, functions=turn)
        epochs.set_xlabel("epoch", font=font_of_size(9), color=MUTED)
        epochs.tick_params(colors=MUTED, labelsize=9, length=3)
        epochs.spines["bottom"].set_color(FAINT)


def _rgb(color: str) -> NDArray[np.float64]:
    return np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255


def _blank_figure() -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(1, 1), dpi=DPI, facecolor="white")


def _png(figure: "Figure") -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    canvas: Any = FigureCanvasAgg(figure)
    canvas.print_png(buffer, metadata={"Software": None})  # no version among the bytes
    return buffer.getvalue()


# Fonts


def printable(text: str, max_length: int) -> str:
    """The text without control and joining characters, which no font draws, cut where it is longer."""
    text = "".join(c for c in text if unicodedata.category(c) not in ("Cc", "Cf"))
    return text if len(text) <= max_length else text[: max_length - 1] + "…"


def find_fonts(texts: Iterable[str]) -> dict[str, str]:
    """The file of the first font that has all glyphs of a text; texts that no font can draw are left out."""
    from matplotlib.ft2font import FT2Font

    missing = set(texts) - {""}
    found: dict[str, str] = {}
    for path in _font_files():
        if not missing:
            break
        try:
            glyph = FT2Font(path).get_char_index
        except (OSError, RuntimeError):  # removed or damaged since matplotlib made its list
            continue
        drawn = {text for text in missing if all(glyph(ord(c)) for c in text)}
        found.update(dict.fromkeys(drawn, path))
        missing -= drawn
    return found


def font_of_size(size: float, path: str | None = None) -> "FontProperties":
    """The font in this file; None: DejaVu Sans, which matplotlib brings along."""
    from matplotlib.font_manager import FontProperties

    return FontProperties(fname=path or _own_font(), size=size)


def text_inches(text: str, font: "FontProperties") -> float:
    """The width of a line of text."""
    from matplotlib.textpath import text_to_path

    return float(text_to_path.get_text_width_height_descent(text, font, False)[0]) / 72


@contextmanager
def quiet_matplotlib() -> Iterator[None]:
    """Without matplotlib's log lines about a cache folder it cannot write and a font list it has to make."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _own_font() -> str:
    import matplotlib

    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))


def _font_files() -> Iterator[str]:
    """DejaVu first, then what is installed: good CJK fonts, upright and regular ones before the others."""
    from matplotlib.font_manager import fontManager

    yield _own_font()
    for entry in sorted(fontManager.ttflist, key=_preference):
        if not entry.name.startswith(PLACEHOLDER_FONTS):
            yield entry.fname


def _preference(entry: Any) -> tuple[bool, bool, bool, str, str]:
    is_bold, is_slanted = entry.weight not in (400, "normal", "regular"), entry.style != "normal"
    return not entry.name.startswith(CJK_FONTS), is_slanted, is_bold, entry.name, entry.fname
