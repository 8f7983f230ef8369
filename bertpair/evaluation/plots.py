"""Pictures of a run as PNG bytes: the confusion matrix and the training curves.

Drawn with matplotlib's objects and defaults, never with pyplot or the user's matplotlibrc: the same input
gives the same bytes. matplotlib is imported when first needed: with its list of fonts it costs a second.
"""

import io
import logging
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_NAME_LENGTH, MAX_TITLE_LENGTH = 28, 60
INK, MUTED, FAINT = "#1f2933", "#66717d", "#c3cad2"
BLUE, ORANGE, GREEN, VIOLET = "#1f5fa8", "#d9730d", "#2b8a57", "#7a5ea8"
STYLE: dict[Any, Any] = {
    **{"figure.dpi": 120, "font.size": 9, "axes.titlesize": 11, "axes.titlelocation": "left"},
    **{"text.color": INK, "axes.edgecolor": FAINT, "grid.color": FAINT, "grid.linewidth": 0.5},
    **dict.fromkeys(("axes.labelcolor", "xtick.color", "ytick.color"), MUTED),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("axes.formatter.useoffset", "text.parse_math"), False),  # "$" is a dollar
}
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
    texts = {k: printable(labels[k], MAX_NAME_LENGTH) for k in kept}
    with drawing("".join(texts.values())) as (figure, no_glyph):
        drawn = {k for k, text in texts.items() if text and not no_glyph & set(text)}
        names = [text if k in drawn else f"class {k}" for k, text in texts.items()]
        notes += ["class k: no installed font draws the name of id k"] if len(drawn) < len(kept) else []
        names += [f"{len(labels) - len(kept)} others"] if len(counts) > len(kept) else []
        # Cells are smaller the more classes, but with room for the longest count in 6.5 points.
        ems = 0.75 * len(f"{counts.max():,}")
        cell = max(0.46, min(1.25, 7.2 / len(counts)), 6.5 / 72 * ems)
        figure.set_size_inches(cell * len(counts), cell * len(counts))
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        _fill_cells(axes, counts, min(15.0, 72 * cell * min(0.28, 1 / ems)), is_brief=cell < 0.6)
        _name_classes(axes, names, counts, cell)
        axes.set_title("\n".join(notes), size=9, color=MUTED, pad=8, linespacing=1.5)
        above = (0, 13 + 13.5 * len(notes))
        axes.annotate("confusion matrix", (0, 1), above, "axes fraction", "offset points", size=12)
        return png(figure, bbox_inches="tight", pad_inches=0.2)  # as large as the names around it need


def _largest_classes(counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], list[int]]:
    """The matrix of the MAX_CLASSES classes with most rows and of one more, all others; and the ids kept."""
    if len(counts) <= MAX_CLASSES:
        return counts, list(range(len(counts)))
    rows = counts.sum(axis=1) + counts.sum(axis=0)
    kept = np.sort(np.argsort(-rows, kind="stable")[:MAX_CLASSES])
    place = np.full(len(counts), MAX_CLASSES)
    place[kept] = np.arange(MAX_CLASSES)
    one_hot = np.eye(MAX_CLASSES + 1, dtype=np.int64)[place]
    return one_hot.T @ counts @ one_hot, kept.tolist()


def _fill_cells(axes: "Axes", counts: NDArray[np.int64], size: float, is_brief: bool) -> None:
    from matplotlib.colors import to_rgb

    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    right = np.eye(len(counts), dtype=bool)
    shade = np.where(right, shares, np.sqrt(shares))  # errors are rare: the root lets them be seen
    cells = 1 - shade[..., None] * (1 - np.where(right[..., None], to_rgb(BLUE), to_rgb(ORANGE)))
    edges = np.arange(len(counts) + 1) - 0.5
    axes.pcolormesh(edges, edges, cells, edgecolors=FAINT, linewidth=0.6, clip_on=False)
    axes.invert_yaxis()
    for (row, column), share in np.ndenumerate(shares):
        style: dict[str, Any] = {"color": "white" if shade[row, column] > 0.7 else INK, "ha": "center"}
        if share:
            percent = f"{share:.0%}" if is_brief or share == 1 else f"{share:.1%}"
            percent = "<1%" if is_brief and share < 0.005 else percent
            axes.text(column, row + 0.04, f"{counts[row, column]:,}", size=size, va="bottom", **style)
            axes.text(column, row + 0.1, percent, size=0.74 * size, va="top", **style)
        elif len(counts) <= 12:
            axes.text(column, row, "0", size=size, va="center", **style, alpha=0.25)


def _name_classes(axes: "Axes", names: Sequence[str], counts: NDArray[np.int64], cell: float) -> None:
    """Class names left and below, tilted where one may be wider than a cell, and the number of rows right."""
    inches = [sum(0.15 if unicodedata.east_asian_width(c) in "WF" else 0.09 for c in name) for name in names]
    font: dict[str, Any] = {"size": 10.5, "color": INK}
    tilt = {"rotation": 45, "rotation_mode": "anchor", "ha": "right", "va": "top"}
    axes.set(xlabel="predicted", ylabel="gold")
    axes.set_yticks(range(len(names)), names, **font)
    axes.set_xticks(range(len(names)), names, **(font if max(inches) < cell else font | tilt))
    rows = axes.secondary_yaxis("right")
    rows.set_yticks(range(len(names)), [f"{total:,}" for total in counts.sum(axis=1)])
    rows.set_ylabel("rows")
    for each in (axes, rows):
        each.tick_params(length=0, pad=6)
        each.spines[:].set_visible(False)


def draw_curves(records: Sequence[Mapping[str, Any]], metric: str | None = None) -> bytes:
    """Losses, the watched metric and the learning rate over steps.

    A record has a `step`, perhaps its `epoch`, and in training `loss` and `lr`, in evaluation `eval_loss` and
    `eval_<metric>`. Values that are absent, null or not finite are left out.
    """
    keys = "loss", "eval_loss", f"eval_{metric}", "lr"
    loss, eval_loss, watched, rate = (_series(records, key) for key in keys)
    show_metric = metric not in (None, "loss") and len(watched) > 0
    labels = [record["eval_positive_label"] for record in records if record.get("eval_positive_label")]
    title = printable(f"f1 of {labels[-1]}", MAX_TITLE_LENGTH) if metric == "f1" and labels else str(metric)
    with drawing(title) as (figure, no_glyph):
        ratios = [1.5, 1.2, 0.7] if show_metric else [1.5, 0.7]
        figure.set_size_inches(9.0, 2.1 * sum(ratios) + 0.9)
        figure.set_layout_engine("constrained", h_pad=0.08, w_pad=0.12)
        panels = figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios)
        names = ["loss", str(metric) if no_glyph else title, "learning rate"]
        for axes, name in zip(panels, names if show_metric else names[::2], strict=True):
            axes.set_title(name)
            axes.grid(alpha=0.7)
        _plot(panels[0], loss, BLUE, "training")
        _plot(panels[0], eval_loss, ORANGE, "dev", best=None if show_metric else np.argmin)
        if len(loss) and len(eval_loss):
            panels[0].legend()
        if show_metric:
            _plot(panels[1], watched, GREEN, "dev", best=np.argmax)
        _plot(panels[-1], rate, VIOLET, "learning rate")
        _style_steps(panels[-1], records)
        return png(figure)


def _series(records: Sequence[Mapping[str, Any]], key: str) -> NDArray[np.float64]:
    """(step, value) rows of the records that have this key."""
    pairs = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    points = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return points[np.isfinite(points[:, 1])]


def _plot(axes: "Axes", points: NDArray[np.float64], color: str, name: str, best: Any = None) -> None:
    """A curve; `best` (np.argmin or np.argmax) says which of its points is to be marked."""
    if not len(points):
        return
    if best is not None:
        step, value = points[best(points[:, 1])]
        axes.plot([step], [value], color=color, marker="*", markersize=13, markeredgecolor="white", zorder=3)
        axes.set_title(f"best {value:.4f} at step {step:,.0f}", loc="right", size=9, color=color)
    if len(points) > MAX_POINTS:
        groups = np.array_split(points, MAX_POINTS)
        low, high = (np.array([edge(group[:, 1]) for group in groups]) for edge in (np.min, np.max))
        points = np.array([group.mean(axis=0) for group in groups])
        axes.fill_between(points[:, 0], low, high, color=color, alpha=0.18, linewidth=0)
    marker = "o" if len(points) == 1 or (name == "dev" and len(points) <= 60) else None
    axes.plot(points[:, 0], points[:, 1], color=color, label=name, linewidth=1.6, marker=marker, markersize=4)


def _style_steps(panel: "Axes", records: Sequence[Mapping[str, Any]]) -> None:
    """The learning rate's own axis, and under it steps and epochs."""
    from matplotlib.ticker import MaxNLocator

    panel.set_ylim(bottom=0)
    panel.set_xlabel("step")
    panel.yaxis.set_major_formatter(lambda rate, _: f"{rate:g}".replace("e-0", "e-"))
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    panel.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    last = next((record for record in reversed(records) if record.get("epoch") and record["step"]), None)
    if last is not None:
        steps_per_epoch = last["step"] / last["epoch"]
        turn = (lambda step: step / steps_per_epoch), (lambda epoch: epoch * steps_per_epoch)
        panel.secondary_xaxis(-0.45, functions=turn).set_xlabel("epoch")


def png(figure: "Figure", **options: Any) -> bytes:
    """The picture's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None}, **options)  # no version among the bytes
    return buffer.getvalue()


@contextmanager
def drawing(text: str) -> Iterator[tuple["Figure", set[str]]]:
    """A figure in our style, drawn within, and the characters of `text` that no installed font has."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)  # nothing of a cache folder it cannot write, or a font list it has to make
    try:
        import matplotlib
        from matplotlib.figure import Figure

        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            families, no_glyph = find_fonts(text)
            matplotlib.rcParams.update({**STYLE, "font.family": families})
            yield Figure(), no_glyph
    finally:
        logger.setLevel(level)


def find_fonts(text: str) -> tuple[list[str], set[str]]:
    """The families that together draw a text, DejaVu Sans first; and the characters that none of them has."""
    from matplotlib.font_manager import fontManager
    from matplotlib.ft2font import FT2Font

    needed, missing = ["DejaVu Sans"], set(text)
    others = {entry.name for entry in fontManager.ttflist if not entry.name.startswith(PLACEHOLDER_FONTS)}
    for family in needed + sorted(others, key=lambda name: (not name.startswith(CJK_FONTS), name)):
        if not missing:
            break
        try:
            drawn = missing & set(map(chr, FT2Font(fontManager.findfont(family)).get_charmap()))
        except (OSError, RuntimeError):  # removed or damaged since matplotlib made its list
            continue
        needed += [family] if drawn else []
        missing -= drawn
    return needed, missing


def printable(text: str, max_length: int) -> str:
    """The text without control and joining characters, which no font draws, cut where it is longer."""
    text = "".join(c for c in text if unicodedata.category(c) not in ("Cc", "Cf"))
    return text if len(text) <= max_length else text[: max_length - 1] + "…"
