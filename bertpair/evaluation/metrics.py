"""Measures of predictions, from arrays, in numpy alone.

Undefined values (no row of a class, constant predictions) are 0.0 without a warning: a table of checkpoints
stays a table of numbers. Classes are ids from 0 to num_labels - 1. What cannot be measured is a ValueError.
"""

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


def accuracy(gold: ArrayLike, predicted: ArrayLike) -> float:
    """The share of rows predicted right."""
    gold_ids, predicted_ids = _ids("gold", gold), _ids("predicted", predicted)
    _check_lengths(gold_ids, predicted_ids)
    return float(np.mean(gold_ids == predicted_ids))


def confusion_matrix(gold: ArrayLike, predicted: ArrayLike, num_labels: int) -> Ids:
    """Counts (C, C): the gold class picks the row, the predicted one the column."""
    gold_ids, predicted_ids = _ids("gold", gold, num_labels), _ids("predicted", predicted, num_labels)
    _check_lengths(gold_ids, predicted_ids)
    counts = np.bincount(gold_ids * num_labels + predicted_ids, minlength=num_labels**2)
    return counts.reshape(num_labels, num_labels).astype(np.int64)


def per_class(gold: ArrayLike, predicted: ArrayLike, num_labels: int) -> PerClass:
    """Precision, recall, F1 and number of gold rows of every class; 0 where undefined."""
    return _per_class(confusion_matrix(gold, predicted, num_labels))


def macro_f1(gold: ArrayLike, predicted: ArrayLike, num_labels: int) -> float:
    """The plain mean of F1 over the classes that occur in gold or predicted (as scikit-learn)."""
    return _macro_f1(confusion_matrix(gold, predicted, num_labels))


def matthews(gold: ArrayLike, predicted: ArrayLike, num_labels: int) -> float:
    """Matthews correlation of any number of classes (Gorodkin 2004, the R_K statistic)."""
    return _matthews(confusion_matrix(gold, predicted, num_labels))


def pearson(gold: ArrayLike, values: ArrayLike) -> float:
    """Pearson's correlation; 0.0 if either side is constant."""
    gold_values, predicted_values = _finite("gold", gold), _finite("predicted", values)
    _check_lengths(gold_values, predicted_values)
    return _correlation(gold_values, predicted_values)


def spearman(gold: ArrayLike, values: ArrayLike) -> float:
    """Spearman's rank correlation, equal values sharing their mean rank; 0.0 if either side is constant."""
    gold_values, predicted_values = _finite("gold", gold), _finite("predicted", values)
    _check_lengths(gold_values, predicted_values)
    return _correlation(_ranks(gold_values), _ranks(predicted_values))


def expected_calibration_error(gold: ArrayLike, probabilities: ArrayLike, num_bins: int = 15) -> float:
    """How far confidence is from accuracy (Guo et al. 2017): rows binned by their top probability into
    `num_bins` equal intervals (low, high], the gaps weighted by rows. `probabilities` is (rows, C)."""
    table = np.asarray(probabilities, dtype=np.float64)
    if table.ndim != 2 or not np.all((table >= 0) & (table <= 1 + 1e-6)):
        found = f"shape {table.shape}, or numbers outside 0 to 1"
        raise ValueError(f"probabilities: found {found}; allowed are rows of one per class")
    gold_ids = _ids("gold", gold, table.shape[1])
    _check_lengths(gold_ids, table)
    confidence = table.max(axis=1)
    right = table.argmax(axis=1) == gold_ids
    bins = np.clip(np.ceil(confidence * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
    gaps = np.bincount(bins, weights=right - confidence, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(gold_ids))


def classification_metrics(
    gold: ArrayLike, predicted: ArrayLike, num_labels: int, positive: int = 1
) -> dict[str, float]:
    """`acc macro_f1 mcc n`, and when there are two classes `f1`, that of the class with the id `positive`."""
    matrix = confusion_matrix(gold, predicted, num_labels)
    metrics: dict[str, float] = {
        "acc": float(np.trace(matrix) / matrix.sum()),
        "macro_f1": _macro_f1(matrix),
        "mcc": _matthews(matrix),
        "n": int(matrix.sum()),
    }
    if num_labels == 2:
        metrics["f1"] = float(_per_class(matrix).f1[positive])
    return metrics


def regression_metrics(gold: ArrayLike, values: ArrayLike) -> dict[str, float]:
    """`pearson spearmanr corr n`, corr being the mean of the two correlations."""
    linear, ranked = pearson(gold, values), spearman(gold, values)
    return {"pearson": linear, "spearmanr": ranked, "corr": (linear + ranked) / 2, "n": np.size(gold)}


def is_better(metric: str, new: float, best: float | None) -> bool:
    """Whether `new` beats `best` (None: nothing yet). Less loss is better, more of all else; NaN never is."""
    if np.isnan(new):
        return False
    if best is None or np.isnan(best):
        return True
    return new < best if metric == "loss" else new > best


def _per_class(matrix: Ids) -> PerClass:
    right, support, named = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    f1 = _ratio(2 * right, support + named)
    return PerClass(_ratio(right, named), _ratio(right, support), f1, support)


def _macro_f1(matrix: Ids) -> float:
    occurs = matrix.sum(axis=0) + matrix.sum(axis=1) > 0
    return float(_per_class(matrix).f1[occurs].mean())


def _matthews(matrix: Ids) -> float:
    exact = matrix.astype(np.float64)  # products of counts can overflow int64
    gold, predicted, total = exact.sum(axis=1), exact.sum(axis=0), exact.sum()
    covariance = np.trace(exact) * total - gold @ predicted
    spread = (total**2 - gold @ gold) * (total**2 - predicted @ predicted)
    return float(covariance / np.sqrt(spread)) if spread > 0 else 0.0


def _ratio(part: Ids, whole: Ids) -> Floats:
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)


def _correlation(x: Floats, y: Floats) -> float:
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


def _ids(name: str, ids: ArrayLike, num_labels: int | None = None) -> Ids:
    array = np.asarray(ids)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"{name}: found {array.dtype} of shape {array.shape}; allowed is one class id per row"
        )
    if num_labels is not None and array.size and not 0 <= array.min() <= array.max() < num_labels:
        found = f"ids from {array.min()} to {array.max()}"
        raise ValueError(f"{name}: found {found}; allowed are 0 to {num_labels - 1}")
    return array.astype(np.int64)


def _finite(name: str, values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name}: found shape {array.shape}; allowed is one number per row")
    if bad := int(np.sum(~np.isfinite(array))):
        raise ValueError(f"{name}: found {bad} numbers that are not finite; only finite ones are allowed")
    return array


def _check_lengths(gold: NDArray[Any], predicted: NDArray[Any]) -> None:
    if len(gold) != len(predicted) or not len(gold):
        found = f"{len(gold)} gold and {len(predicted)} predicted"
        raise ValueError(f"rows: found {found}; as many of both are allowed, at least one")
