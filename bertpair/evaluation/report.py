"""Results as a person reads them: the bytes of the evaluation files, and tables as text for the terminal.

Nothing is written here: a caller puts these bytes, and those of the pictures, where they belong, durably.
"""

import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from bertpair.evaluation.classifier import Prediction
from bertpair.evaluation.metrics import PerClass, best_of, finite_or_null

MAX_TABLE_WIDTH = 110
ESCAPES = {ord("\t"): "\\t", ord("\n"): "\\n", ord("\r"): "\\r"}


def format_eval_results(metrics: Mapping[str, float | int | str]) -> dict[str, bytes]:
    """`eval_results.txt`, sorted "key = value" lines, and `eval_results.json`, flat (null: not finite)."""
    plain = {key: value.item() if isinstance(value, np.generic) else value for key, value in metrics.items()}
    shown = {key: _cell(value) if isinstance(value, str) else value for key, value in sorted(plain.items())}
    text = "".join(f"{key} = {value}\n" for key, value in shown.items())
    finite = finite_or_null(plain)
    flat = json.dumps(finite, ensure_ascii=False, indent=2, sort_keys=True, allow_nan=False)
    return {"eval_results.txt": text.encode(), "eval_results.json": f"{flat}\n".encode()}


def format_predictions(
    predictions: Sequence[Prediction],
    lines: Iterable[int],
    *,
    files: Iterable[str] | None = None,
    gold: Iterable[str | float] | None = None,
    labels: Sequence[str] | None = None,
) -> bytes:
    """`predictions.tsv`, a row per prediction: file (if given), line, gold (if given), predicted, score,
    truncated (0 or 1), and a column `prob_<label>` for each of `labels`; none for regression, where the score
    is the value."""
    columns: dict[str, Iterable[str]] = {} if files is None else {"file": map(_cell, files)}
    columns["line"] = map(str, lines)
    if gold is not None:
        columns["gold"] = map(_cell, gold)
    columns["predicted"] = [_cell(p.score if p.label is None else p.label) for p in predictions]
    columns["score"] = [format(p.score, ".6f" if labels else ".6g") for p in predictions]
    columns["truncated"] = [str(int(p.truncated)) for p in predictions]
    for label in labels or ():
        column = [f"{p.probabilities[label]:.6f}" for p in predictions]
        columns[f"prob_{label.translate(ESCAPES)}"] = column
    return tsv([list(columns), *zip(*columns.values(), strict=True)])


def tsv(lines: Iterable[Iterable[str]]) -> bytes:
    """Lines of cells, tab-separated."""
    return "".join("\t".join(cells) + "\n" for cells in lines).encode()


def exact(value: object) -> str:
    """A cell with all digits of a number; empty for None."""
    return "" if value is None else value if isinstance(value, str) else repr(value)


def class_table(labels: Sequence[str], measures: PerClass) -> str:
    """Precision, recall, F1 and number of gold rows of every class."""
    columns = measures.precision, measures.recall, measures.f1, measures.support
    rows = [[label, *values] for label, *values in zip(labels, *columns, strict=True)]
    return text_table(["class", "precision", "recall", "f1", "rows"], rows)


def confusion_table(labels: Sequence[str], matrix: ArrayLike) -> str:
    """Counts, gold classes down and predicted ones across; ids head the columns where names are too wide."""
    counts = np.asarray(matrix).tolist()
    heads, names = list(labels), list(labels)
    if sum(display_width(label) + 2 for label in labels) > MAX_TABLE_WIDTH:
        heads = [str(k) for k in range(len(labels))]
        names = [f"{k} {label}" for k, label in enumerate(labels)]
    rows = [[name, *row] for name, row in zip(names, counts, strict=True)]
    return text_table(["gold \\ predicted", *heads], rows)


def comparison_table(results: Mapping[str, Mapping[str, Any]], metric: str | None = None) -> str:
    """A line per checkpoint or run, in the order given; the best by `metric`, of equals the first, has a
    star."""
    keys = list(dict.fromkeys(key for metrics in results.values() for key in metrics))
    best = (
        best_of({name: metrics.get(metric) for name, metrics in results.items()}, metric) if metric else None
    )
    rows = [
        [f"{name} *" if name == best else name, *(metrics.get(key) for key in keys)]
        for name, metrics in results.items()
    ]
    return text_table(["", *keys], rows)


def text_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Columns aligned by display width, the first to the left, the rest to the right; None is a dash."""
    cells = [[_table_cell(value) for value in row] for row in (header, *rows)]
    widths = [max(map(display_width, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *others in cells:
        padded = [first + " " * (widths[0] - display_width(first))]
        padded += [" " * (w - display_width(cell)) + cell for w, cell in zip(widths[1:], others, strict=True)]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def display_width(text: str) -> int:
    """Columns in a terminal: two for a wide or full-width character, none for one that joins the last."""
    joins = ("Mn", "Me", "Cf")
    return sum(
        0 if unicodedata.category(c) in joins else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text
    )


def _table_cell(value: Any) -> str:
    if value is None or isinstance(value, str):
        return "-" if value is None else _cell(value)
    return f"{value:,}" if isinstance(value, (int, np.integer)) else f"{value:.4f}"


def _cell(value: str | float) -> str:
    """A label as it is, but no tab or line break of its own; a number to six digits."""
    return value.translate(ESCAPES) if isinstance(value, str) else format(value, ".6g")
