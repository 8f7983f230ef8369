"""Results as a person reads them: the bytes of the evaluation files, and tables as text for the terminal.

Nothing is written here: a caller puts these bytes, and those of the pictures, where they belong, durably.
"""

import json
import unicodedata
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from bertpair.data.dataset import Pairs
from bertpair.evaluation.classifier import Prediction
from bertpair.evaluation.metrics import Ids, best_of, finite_or_null
from bertpair.evaluation.significance import Comparison

MAX_TABLE_WIDTH = 110
SIGNIFICANCE_HEAD = ["against", "figure", "difference", "95 % interval", "rows won", "rows lost", "p"]
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
    pairs: Pairs,
    labels: Sequence[str] | None = None,
    *,
    with_texts: bool = False,
    with_file: bool | None = None,
    has_header: bool = True,
) -> bytes:
    """`predictions.tsv`, a row per prediction: file (by default of several), line, gold (if there is any),
    predicted, score, truncated (0 or 1), a column `prob_<label>` for each of `labels`, perhaps the texts, and
    the columns that are kept; no labels for regression, where the score is the value."""
    columns: dict[str, Iterable[str]] = {}
    if len(pairs.files) > 1 if with_file is None else with_file:
        columns["file"] = [_cell(pairs.files[number]) for number in pairs.file_of_row]
    columns["line"] = map(str, pairs.line_of_row)
    if pairs.labels is not None:
        columns["gold"] = map(_cell, pairs.labels)
    columns["predicted"] = [_cell(p.score if p.label is None else p.label) for p in predictions]
    columns["score"] = [format(p.score, ".6f" if labels else ".6g") for p in predictions]
    columns["truncated"] = [str(int(p.truncated)) for p in predictions]
    for label in labels or ():
        column = [f"{p.probabilities[label]:.6f}" for p in predictions]
        columns[f"prob_{label.translate(ESCAPES)}"] = column
    columns |= _texts(pairs) if with_texts else {}
    for name, cells in (pairs.kept or {}).items():
        columns[_name_of_kept(_cell(name), columns)] = [cell.translate(ESCAPES) for cell in cells]
    rows = zip(*columns.values(), strict=True)
    return tsv([list(columns), *rows] if has_header else rows)


def format_lines(
    predictions: Sequence[Prediction], pairs: Pairs, *, with_texts: bool = False, with_file: bool = False
) -> bytes:
    """`predictions.jsonl`, an object per prediction, with what a row of predictions.tsv has. Texts and kept
    columns are as they were read."""
    lines = []
    for row, answer in enumerate(predictions):
        said: dict[str, Any] = {"file": pairs.files[pairs.file_of_row[row]]} if with_file else {}
        said["line"] = int(pairs.line_of_row[row])
        if answer.label is None:
            said["predicted"] = answer.score
        else:
            said |= {"predicted": answer.label, "score": round(answer.score, 6)}
        said["truncated"] = answer.truncated
        if answer.label is not None:
            said["probabilities"] = {name: round(p, 6) for name, p in answer.probabilities.items()}
        texts = {"text_a": pairs.text_a, "text_b": pairs.text_b} if with_texts else {}
        said |= {name: column[row] for name, column in texts.items() if column is not None}
        for name, cells in (pairs.kept or {}).items():
            said[_name_of_kept(name, said)] = cells[row]
        lines.append(json.dumps(said, ensure_ascii=False) + "\n")
    return "".join(lines).encode(errors="surrogateescape")


def _name_of_kept(name: str, taken: Container[str]) -> str:
    """What a kept column is called: its name, unless that means something else."""
    return f"kept_{name}" if name in taken else name


def format_errors(predictions: Sequence[Prediction], pairs: Pairs, rows: Sequence[int] | Ids) -> bytes:
    """`errors.tsv`: these rows, each with its file, line, label, what was answered, how surely, and texts."""
    chosen, found = pairs.take(np.asarray(rows, np.int64)), [predictions[row] for row in rows]
    columns = {
        "file": [_cell(chosen.files[number]) for number in chosen.file_of_row],
        "line": map(str, chosen.line_of_row),
        "gold": map(_cell, chosen.labels or ()),
        "predicted": [_cell(p.score if p.label is None else p.label) for p in found],
    }
    if found and found[0].label is not None:
        columns["score"] = [f"{p.score:.6f}" for p in found]
        columns["prob_gold"] = [
            f"{p.probabilities[gold]:.6f}" for p, gold in zip(found, chosen.labels or (), strict=True)
        ]
    columns |= _texts(chosen)
    return tsv([list(columns), *zip(*columns.values(), strict=True)])


def _texts(pairs: Pairs) -> dict[str, list[str]]:
    texts = {"text_a": pairs.text_a} | ({} if pairs.text_b is None else {"text_b": pairs.text_b})
    return {name: [text.translate(ESCAPES) for text in column] for name, column in texts.items()}


def tsv(lines: Iterable[Iterable[str]]) -> bytes:
    """Lines of cells, tab-separated."""
    return "".join("\t".join(cells) + "\n" for cells in lines).encode()


def exact(value: object) -> str:
    """A cell with all digits of a number; empty for None."""
    return "" if value is None else value if isinstance(value, str) else repr(value)


def class_table(classes: Mapping[str, Mapping[str, Any]]) -> str:
    """A line of figures for every class, by its label."""
    names = list(next(iter(classes.values())))
    return text_table(["class", *names], [[label, *each.values()] for label, each in classes.items()])


def group_table(groups: Sequence[Mapping[str, Any]], most: int = 20) -> str:
    """A line of figures for every group, or for the first `most` of them."""
    more = f"\nand {len(groups) - most:,} more groups, in figures.json" if len(groups) > most else ""
    return text_table(list(groups[0]), [list(each.values()) for each in groups[:most]]) + more


def figure_lines(figures: Mapping[str, Any]) -> str:
    """`acc = 0.896 (95 % interval 0.8805 to 0.9113)`, a line for each figure, sorted."""
    lines = []
    for key, value in sorted(figures.items()):
        if key.endswith(("_low", "_high")) and key.rpartition("_")[0] in figures:
            continue
        shown = _cell(value) if isinstance(value, str) else format(value, ".6g")
        low, high = figures.get(f"{key}_low"), figures.get(f"{key}_high")
        interval = "" if low is None else f" (95 % interval {low:.4f} to {high:.4f})"
        lines.append(f"{key} = {shown}{interval}")
    return "\n".join(lines)


def confusion_table(labels: Sequence[str], matrix: ArrayLike) -> str:
    """Counts, gold classes down and predicted ones across; ids head the columns where names are too wide."""
    counts = np.asarray(matrix).tolist()
    heads, names = list(labels), list(labels)
    if sum(display_width(label) + 2 for label in labels) > MAX_TABLE_WIDTH:
        heads = [str(k) for k in range(len(labels))]
        names = [f"{k} {label}" for k, label in enumerate(labels)]
    rows = [[name, *row] for name, row in zip(names, counts, strict=True)]
    return text_table(["gold \\ predicted", *heads], rows)


def figure_names(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The figures that a table of models has room for: no ends of intervals."""
    keys = dict.fromkeys(key for metrics in results.values() for key in metrics)
    return [key for key in keys if not key.endswith(("_low", "_high"))]


def comparison_table(results: Mapping[str, Mapping[str, Any]], metric: str | None = None) -> str:
    """A line per checkpoint or run, in the order given; the best by `metric`, of equals the first, has a
    star."""
    keys = figure_names(results)
    best = (
        best_of({name: metrics.get(metric) for name, metrics in results.items()}, metric) if metric else None
    )
    rows = [
        [f"{name} *" if name == best else name, *(metrics.get(key) for key in keys)]
        for name, metrics in results.items()
    ]
    return text_table(["", *keys], rows)


def significance_table(comparisons: Mapping[str, Comparison]) -> str:
    """How one model differs from each of others, by the name of that one."""
    return text_table(SIGNIFICANCE_HEAD, significance_rows(comparisons))


def significance_rows(comparisons: Mapping[str, Comparison]) -> list[list[Any]]:
    """A line under SIGNIFICANCE_HEAD for each figure of each comparison."""
    return [
        [
            *(name, figure, f"{difference.value:+.4f}", f"{difference.low:+.4f} to {difference.high:+.4f}"),
            *(comparison.won, comparison.lost, p_text(comparison.p_value)),
        ]
        for name, comparison in comparisons.items()
        for figure, difference in comparison.differences.items()
    ]


def p_text(p_value: float) -> str:
    """`0.0312`, or `<0.0001`"""
    return "<0.0001" if p_value < 0.0001 else f"{p_value:.4f}"


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
