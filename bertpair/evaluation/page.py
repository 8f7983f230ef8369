"""A report as one HTML file that loads nothing: no script, font or picture from elsewhere.

A page is described by the types below, and `render` fills page.html with it. Every text is escaped; only a
picture is markup, an SVG element from `plots`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from bertpair import __version__
from bertpair.evaluation.plots import UNFIT_FOR_MARKUP, largest_classes

REPORT = "report.html"

Value = str | int | float | None  # of a cell; None is a dash


class Column(NamedTuple):
    """A column's name and kind: a `text` is long, in any script; a `share` is from 0 to 1 and has a bar."""

    name: str
    kind: Literal["value", "number", "text", "share"] = "value"  # numbers alone make a value a number


@dataclass(frozen=True)
class Table:
    """Rows with a cell for each column. A table with texts becomes a list of cards on a narrow screen."""

    head: Sequence[str | Column]
    rows: Sequence[Sequence[Value]]
    caption: str = ""
    is_sortable: bool = False

    @property
    def columns(self) -> list[Column]:
        """The columns, with the kind that their cells give them. ValueError: a row of another length."""
        named = [Column(each) if isinstance(each, str) else each for each in self.head]
        cells = list(zip(*self.rows, strict=True)) or [()] * len(named)
        return [
            column._replace(kind="number") if column.kind == "value" and _are_numbers(values) else column
            for column, values in zip(named, cells, strict=True)
        ]

    @property
    def lines(self) -> list[list[tuple[Column, Value]]]:
        """The rows, each cell with its column."""
        columns = self.columns
        return [list(zip(columns, row, strict=True)) for row in self.rows]


@dataclass(frozen=True)
class Matrix:
    """A confusion matrix: counts (C, C), gold classes down and predicted ones across. Beyond MAX_CLASSES,
    those with the fewest rows become one."""

    counts: ArrayLike
    labels: Sequence[str]
    caption: str = ""

    @property
    def names(self) -> list[str]:
        """The labels that have a row of their own, and one name for all others."""
        kept = largest_classes(np.asarray(self.counts, np.int64))[1]
        num_others = len(self.labels) - len(kept)
        return [self.labels[k] for k in kept] + ([f"{num_others:,} others"] if num_others else [])

    @property
    def lines(self) -> list[list[tuple[int, float]]]:
        """Counts, and their share of the gold class."""
        counts = largest_classes(np.asarray(self.counts, np.int64))[0]
        shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
        return [list(zip(*line, strict=True)) for line in zip(counts.tolist(), shares.tolist(), strict=True)]


@dataclass(frozen=True)
class Picture:
    """An SVG element, trusted as it is, and what it shows in words, for those who do not see it."""

    svg: bytes
    text: str


@dataclass(frozen=True)
class Code:
    """A command or a file, with a button to copy it."""

    text: str
    caption: str


@dataclass(frozen=True)
class Note:
    """A sentence that stands out; a warning more so."""

    text: str
    is_warning: bool = False


Block = str | Table | Matrix | Picture | Code | Note  # a str is a paragraph


class Figure(NamedTuple):
    """A headline figure, and what to know beside it, such as its interval."""

    name: str
    value: Value
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page that its list of sections names."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A whole report."""

    title: str
    subtitle: str
    figures: Sequence[Figure]
    sections: Sequence[Section]


def render(page: Page) -> bytes:
    """The page as an HTML file in UTF-8; the same page gives the same bytes."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=_without_controls,
    )
    environment.filters |= {
        "shown": shown,
        "percent": _percent,
        "sort_key": _sort_key,
        "kind": lambda block: type(block).__name__,
    }
    template = environment.get_template("page.html")
    return template.render(page=page, version=__version__).encode()


def shown(value: Value) -> str:
    """A cell as text: separators between thousands, four digits of a fraction, or three of a tiny one."""
    if value is None or isinstance(value, str):
        return "–" if value is None else value
    if isinstance(value, (int, np.integer)):
        return f"{value:,}"
    return f"{value:.3g}" if 0 < abs(value) < 0.001 else f"{value:,.4f}"


def _percent(share: float) -> str:
    return "100%" if share == 1 else "<0.1%" if share < 0.0005 else f"{share:.1%}"


def _sort_key(value: Value) -> str | None:
    """What a browser sorts by in place of the text; empty for what stands last."""
    if isinstance(value, str):
        return None
    if value is None or math.isnan(value):
        return ""
    return repr(float(value)).replace("inf", "Infinity")


def _are_numbers(values: Sequence[Value]) -> bool:
    numbers = [value for value in values if value is not None]
    return bool(numbers) and not any(isinstance(value, str) for value in numbers)


def _without_controls(value: Any) -> Any:
    """A text without what HTML or UTF-8 cannot hold, such as the bytes of a file name that are no UTF-8."""
    return UNFIT_FOR_MARKUP.sub("\ufffd", value) if type(value) is str else value
