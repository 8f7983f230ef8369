"""Pictures of a run: the confusion matrix, the training curves and the reliability diagram.

They are PNG bytes for a file, and those that a page shows also an SVG element. Drawn with matplotlib's
objects and defaults, never with pyplot or the user's matplotlibrc: the same input gives the same bytes.
matplotlib is imported when first needed: with its list of fonts it costs a second.
"""

import hashlib
import io
import logging
import re
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_NAME_LENGTH, MAX_TITLE_LENGTH = 28, 60
INK, MUTED, FAINT = "#1f2933", "#66717d", "#c3cad2"
BLUE, ORANGE, GREEN, VIOLET = "#1f5fa8", "#d9730d", "#2b8a57", "#7a5ea8"
WHITE = "#ffffff"
VARIABLES = {  # what a page may set for its pictures, and their colours where it does not
    **{INK: "--ink", MUTED: "--muted", FAINT: "--faint", WHITE: "--ground"},
    **{BLUE: "--blue", ORANGE: "--orange", GREEN: "--green", VIOLET: "--violet"},
}
STYLE: dict[Any, Any] = {
    **{"figure.dpi": 120, "font.size": 9, "axes.titlesize": 11, "axes.titlelocation": "left"},
    **{"text.color": INK, "axes.edgecolor": FAINT, "grid.color": FAINT, "grid.linewidth": 0.5},
    **dict.fromkeys(("axes.labelcolor", "xtick.color", "ytick.color"), MUTED),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("axes.formatter.useoffset", "text.parse_math"), False),  # "$" is a dollar
    **{"svg.fonttype": "none", "svg.hashsalt": "bertpair"},  # text stays text; ids that do not change
}
# Tried first where DejaVu lacks a glyph: they draw Chinese, Japanese and Korean well.
CJK_FONTS = ("Noto Sans CJK", "Source Han Sans", "PingFang", "Microsoft YaHei", "WenQuanYi")
# They have a glyph for every character, but it is a box or a blank.
PLACEHOLDER_FONTS = ("Last Resort", "LastResort", "Adobe Blank")
MAX_CLASSES = 40
MAX_POINTS = 400  # a longer curve is averaged, with a band from least to greatest
UNFIT_FOR_MARKUP = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def draw_confusion(matrix: ArrayLike, labels: Sequence[str]) -> bytes:
    """Gold classes down, predicted ones across; in each cell the count and its share of the gold class, which
    also sets the shade: blue where right, orange where wrong. A name that no installed font can draw appears
    as `class k`, k being its id. Beyond MAX_CLASSES, those with the fewest rows become one."""
    counts = np.asarray(matrix, dtype=np.int64)
    share_right = np.trace(counts) / max(1, counts.sum())
    notes = [f"{share_right:.2%} of {counts.sum():,} rows are right", "shade and %: share of the gold class"]
    counts, kept = largest_classes(counts)
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


def largest_classes(counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], list[int]]:
    """The matrix (C, C) of the MAX_CLASSES classes with most rows and of one more, all others; and the ids
    kept."""
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


def draw_curves(
    records: Sequence[Mapping[str, Any]], metric: str | None = None, *, as_svg: bool = False
) -> bytes:
    """Losses, the watched metric and the learning rate over steps: a PNG, or an SVG element for a page.

    A record has a `step`, perhaps its `epoch`, and in training `loss` and `lr`, in evaluation `eval_loss` and
    `eval_<metric>`. Values that are absent, null or not finite are left out.
    """
    keys = "loss", "eval_loss", f"eval_{metric}", "lr"
    loss, eval_loss, watched, rate = (_series(records, key) for key in keys)
    show_metric = metric not in (None, "loss") and len(watched) > 0
    labels = [record["eval_positive_label"] for record in records if record.get("eval_positive_label")]
    title = printable(f"f1 of {labels[-1]}", MAX_TITLE_LENGTH) if metric == "f1" and labels else str(metric)
    with drawing("" if as_svg else title) as (figure, no_glyph):  # a browser has its own fonts
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
        return svg(figure) if as_svg else png(figure)


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


def draw_reliability(
    confidence: ArrayLike, accuracy: ArrayLike, rows: ArrayLike, *, as_svg: bool = False
) -> bytes:
    """How often a label was right beside its probability, and below it the number of rows: a PNG, or an SVG
    element for a page. All three (K,) are by part, K equal ones from 0 to 1: the mean probability, the share
    of right rows and their number. A part without rows is left out, whatever it has."""
    counts = np.asarray(rows, dtype=np.int64)
    is_filled = counts > 0
    x, y = (np.asarray(values, dtype=np.float64)[is_filled] for values in (confidence, accuracy))
    with drawing("") as (figure, _):
        figure.set_size_inches(5.0, 6.0)
        figure.set_layout_engine("constrained", h_pad=0.08, w_pad=0.12)
        curve, histogram = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        curve.set(xlim=(0, 1), ylim=(0, 1))
        curve.set_title("accuracy")
        curve.grid(alpha=0.7)
        curve.plot([0, 1], [0, 1], "--", color=MUTED, linewidth=1, label="accuracy = confidence")
        curve.vlines(x, x, y, color=ORANGE, linewidth=2.2, label="gap")
        curve.plot(x, y, "o", color=BLUE, markersize=6, clip_on=False, zorder=3, label="accuracy")
        curve.legend(loc="upper left")
        _draw_histogram(histogram, counts)
        for axis in (curve.yaxis, histogram.xaxis):
            axis.set_major_formatter(lambda share, _: f"{share:.0%}")
        histogram.set_xlabel("confidence: the probability of the predicted label")
        return svg(figure) if as_svg else png(figure)


def _draw_histogram(axes: "Axes", counts: NDArray[np.int64]) -> None:
    """A bar with its number for each of the equal parts from 0 to 1."""
    places = (np.arange(len(counts)) + 0.5) / len(counts)
    words = [f"{count:,}" if count < 10_000 else f"{count / 1000:,.0f}k" for count in counts]
    bars = axes.bar(places, counts, width=0.86 / len(counts), color=FAINT)
    axes.bar_label(bars, [word if word != "0" else "" for word in words], size=7, color=MUTED, padding=2)
    axes.set_title("rows")
    axes.set(yticks=[], ylim=(0, 1.25 * max(1, counts.max())))
    axes.spines.left.set_visible(False)


def png(figure: "Figure", **options: Any) -> bytes:
    """The picture's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None}, **options)  # no version among the bytes
    return buffer.getvalue()


def svg(figure: "Figure") -> bytes:
    """The picture as an SVG element in UTF-8, to stand in a page: as wide as there is room, on no ground, in
    the page's VARIABLES, with ids that no other picture has. It has no namespaces, which HTML does without.
    """
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of glyphs that matplotlib's fonts lack
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    picture = UNFIT_FOR_MARKUP.sub("\ufffd", buffer.getvalue())
    root = ElementTree.fromstring(picture)
    width = float(root.attrib["viewBox"].split()[2])
    _fit_attributes(root, hashlib.sha256(picture.encode()).hexdigest()[:8])
    room = f"width: 100%; min-width: {0.65 * width:.0f}pt; max-width: {width:.0f}pt"  # less cannot be read
    root.attrib = {"viewBox": root.attrib["viewBox"], "style": f"{room}; stroke-linejoin: round"}
    for rules in root.findall("defs[style]"):  # they would hold for the whole page
        root.remove(rules)
    return ElementTree.tostring(root, encoding="unicode").encode()


def _fit_attributes(root: ElementTree.Element, digest: str) -> None:
    """Makes ids the picture's own, and colours and fonts the page's; texts are left alone."""
    ids = {f"#{element.get('id')}": f"#{element.get('id')}-{digest}" for element in root.iter()}
    words = ids | {color: f"var({name}, {color})" for color, name in VARIABLES.items()}

    def fit(value: str) -> str:
        value = re.sub(r"(\.\d\d)\d+", r"\1", value).replace("'DejaVu Sans'", "var(--font, sans-serif)")
        return re.sub(r"#\w+", lambda found: words.get(found[0], found[0]), value)

    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {name.rpartition("}")[2]: fit(value) for name, value in element.attrib.items()}
        if "id" in element.attrib:
            element.attrib["id"] += f"-{digest}"
        if not (element.tail or "").strip():
            element.tail = "\n"


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
    text = UNFIT_FOR_MARKUP.sub("\ufffd", text)  # matplotlib, too, takes no half of a surrogate pair
    return text if len(text) <= max_length else text[: max_length - 1] + "…"
