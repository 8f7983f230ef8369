"""Measures of predictions, from arrays, in numpy alone.

Undefined values (no row of a class, constant predictions) are 0.0 without a warning: a table of checkpoints
stays a table of numbers. Classes are ids from 0 to num_labels - 1; `gold` and what is held against it are of
one length, at least 1.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]


class PerClass(NamedTuple):
    """One entry per class."""

    precision: Floats
    recall: Floats
    f1: Floats
    support: Ids


def confusion_matrix(gold: ArrayLike, predicted: ArrayLike, num_labels: int) -> Ids:
    """Counts (C, C): the gold class picks the row, the predicted one the column."""
    cells = np.asarray(gold, np.int64) * num_labels + np.asarray(predicted, np.int64)
    return np.bincount(cells, minlength=num_labels**2).reshape(num_labels, num_labels).astype(np.int64)


def per_class(matrix: Ids) -> PerClass:
    """Precision, recall, F1 and number of gold rows of every class, from `confusion_matrix`; 0 where
    undefined."""
    right, support, named = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    f1 = _ratio(2 * right, support + named)
    return PerClass(_ratio(right, named), _ratio(right, support), f1, support)


def pearson(gold: ArrayLike, values: ArrayLike) -> float:
    """Pearson's correlation; 0.0 if either side is constant, NaN if a number is not finite."""
    return _correlation(np.asarray(gold, np.float64), np.asarray(values, np.float64))


def spearman(gold: ArrayLike, values: ArrayLike) -> float:
    """Spearman's rank correlation, equal values sharing their mean rank; 0.0 and NaN as for `pearson`."""
    x, y = np.asarray(gold, np.float64), np.asarray(values, np.float64)
    are_finite = np.isfinite(x).all() and np.isfinite(y).all()
    return _correlation(_ranks(x), _ranks(y)) if are_finite else math.nan


def classification_metrics(
    gold: ArrayLike, predicted: ArrayLike, num_labels: int, positive: int = 1
) -> dict[str, float]:
    """`acc macro_f1 mcc n`, and when there are two classes `f1`, that of the class with the id `positive`."""
    matrix = confusion_matrix(gold, predicted, num_labels)
    f1 = per_class(matrix).f1
    occurs = matrix.sum(axis=0) + matrix.sum(axis=1) > 0  # in gold or predicted: scikit-learn's mean too
    metrics: dict[str, float] = {
        "acc": float(np.trace(matrix) / matrix.sum()),
        "macro_f1": float(f1[occurs].mean()),
        "mcc": _matthews(matrix),
        "n": int(matrix.sum()),
    }
    return {**metrics, "f1": float(f1[positive])} if num_labels == 2 else metrics


def regression_metrics(gold: ArrayLike, values: ArrayLike) -> dict[str, float]:
    """`pearson spearmanr corr n`, corr being the mean of the two correlations."""
    linear, ranked = pearson(gold, values), spearman(gold, values)
    return {"pearson": linear, "spearmanr": ranked, "corr": (linear + ranked) / 2, "n": np.size(gold)}


def finite_or_null(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as JSON can hold them: null for a number that is not finite."""
    bad = {key for key, value in values.items() if isinstance(value, float) and not math.isfinite(value)}
    return {key: None if key in bad else value for key, value in values.items()}


def is_better(metric: str, new: float, best: float | None) -> bool:
    """Whether `new` beats `best` (None: nothing yet). Less loss is better, more of all else; NaN never is."""
    if np.isnan(new):
        return False
    if best is None or np.isnan(best):
        return True
    return new < best if metric == "loss" else new > best


def best_of(values: Mapping[str, float | None], metric: str) -> str | None:
    """The name with the best value; of equals, the first; None where there is no value."""
    best, best_value = None, None
    for name, value in values.items():
        if value is not None and is_better(metric, value, best_value):
            best, best_value = name, value
    return best


def _matthews(matrix: Ids) -> float:
    """Matthews correlation of any number of classes (Gorodkin 2004, the R_K statistic)."""
    exact = matrix.astype(np.float64)  # products of counts can overflow int64
    gold, predicted, total = exact.sum(axis=1), exact.sum(axis=0), exact.sum()
    covariance = np.trace(exact) * total - gold @ predicted
    spread = (total**2 - gold @ gold) * (total**2 - predicted @ predicted)
    return float(covariance / np.sqrt(spread)) if spread > 0 else 0.0


def _ratio(part: Ids, whole: Ids) -> Floats:
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)


def _correlation(x: Floats, y: Floats) -> float:
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return math.nan
    # Centring a constant can leave rounding noise, which would correlate with anything: look at the values.
    if x.min() == x.max() or y.min() == y.max():
        return 0.0
    x, y = _unit(x), _unit(y)
    return float(np.clip(x @ y, -1.0, 1.0))


def _unit(x: Floats) -> Floats:
    """Centred and of length 1; scaled twice, so that neither huge nor tiny values overflow or vanish."""
    x = x / np.abs(x).max()
    x = x - x.mean()
    x = x / np.abs(x).max()
    return x / np.sqrt(x @ x)


def _ranks(x: Floats) -> Floats:
    _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place]
