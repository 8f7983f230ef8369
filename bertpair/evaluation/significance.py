"""How sure a figure is, and whether two models differ by more than luck.

A bootstrap (Efron and Tibshirani 1993) draws as many rows as there are, with replacement, and measures again.
Rows that fall into one cell of a table of counts are alike: what is drawn is how often each cell occurs.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bertpair.evaluation.metrics import Floats, Ids, classification_metrics

CONFIDENCE = 0.95
REPLICATES = 2000
NUMBERS_AT_ONCE = 2**21  # 16 MB
FIGURES = ("acc", "macro_f1")


class Difference(NamedTuple):
    """Ours minus theirs, with its 95 % interval."""

    value: float
    low: float
    high: float


class Comparison(NamedTuple):
    """Two models on the same rows. The p value is that of the sign test of the rows won and lost; of labels,
    this is McNemar's exact test."""

    won: int  # rows where ours is right and theirs wrong; of values, where our error is smaller
    lost: int
    p_value: float
    differences: dict[str, Difference]  # by metric


class SeedComparison(NamedTuple):
    """Two ways of training, each with the same seeds: the mean difference, and the p value of the paired
    t test."""

    difference: Difference
    p_value: float


def bootstrap_intervals(matrix: Ids) -> dict[str, tuple[float, float]]:
    """95 % intervals (low, high) of `acc` and `macro_f1`, from `confusion_matrix` (C, C) with a row at least.

    Errors that no row shows cannot be drawn: where all rows are right, the interval is (1.0, 1.0).
    """
    gold, predicted = np.nonzero(matrix)
    counts = matrix[gold, predicted]
    measure = functools.partial(_measure, gold=gold, predicted=predicted, num_labels=len(matrix))
    drawn, (values,) = _replicates(counts, measure), measure(counts[None])
    columns = zip(FIGURES, drawn.T, values, _accelerations(matrix), strict=True)
    return {name: _interval(*each) for name, *each in columns}


def compare_labels(gold: ArrayLike, ours: ArrayLike, theirs: ArrayLike, num_labels: int) -> Comparison:
    """Two models' class ids (n,) against the gold ones: who is right, and the differences in `acc` and
    `macro_f1` with paired bootstrap intervals. ValueError for an id outside 0 to num_labels - 1."""
    rows = tuple(np.asarray(each, np.int64) for each in (gold, ours, theirs))
    shape = (num_labels,) * 3
    cells, counts = np.unique(np.ravel_multi_index(rows, shape), return_counts=True)
    truth, *named = np.unravel_index(cells, shape)

    def measure(drawn: Ids) -> Floats:
        mine, other = (_measure(drawn, truth, each, num_labels) for each in named)
        return mine - other

    mine, other = (classification_metrics(rows[0], each, num_labels) for each in rows[1:])
    values = [mine[name] - other[name] for name in FIGURES]
    columns = zip(FIGURES, _replicates(counts, measure).T, values, strict=True)
    differences = {name: _difference(*each) for name, *each in columns}
    is_right, other_is_right = (each == truth for each in named)
    won, lost = (int(counts[each].sum()) for each in (is_right & ~other_is_right, other_is_right & ~is_right))
    return Comparison(won, lost, sign_test(won, lost), differences)


def compare_values(gold: ArrayLike, ours: ArrayLike, theirs: ArrayLike) -> Comparison:
    """Two regressions' values (n,) against the gold ones: whose error is smaller, and the difference in
    `loss`, the mean squared error, with its paired bootstrap interval. Numbers must be finite."""
    target, *values = (np.asarray(each, np.float64) for each in (gold, ours, theirs))
    mine, other = (np.abs(each - target) for each in values)
    won, lost = int((mine < other).sum()), int((mine > other).sum())
    excess = mine**2 - other**2
    generator, n = np.random.default_rng(0), len(excess)
    drawn = [excess[generator.integers(n, size=(part, n))].mean(axis=1) for part in _parts(n)]
    difference = _difference(np.concatenate(drawn), float(np.mean(mine**2) - np.mean(other**2)))
    return Comparison(won, lost, sign_test(won, lost), {"loss": difference})


def compare_seeds(ours: Sequence[float], theirs: Sequence[float]) -> SeedComparison:
    """A metric of two ways of training, seed by seed: at least two seeds, both in the same order."""
    from scipy.stats import ttest_rel

    mine, other = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert mine.shape == other.shape and len(mine) >= 2
    differences = mine - other
    mean = float(differences.mean())
    rounding = 1e-12 * max(np.abs(mine).max(), np.abs(other).max())
    if np.ptp(differences) <= rounding:  # no spread: a t test would divide by it
        return SeedComparison(Difference(mean, mean, mean), 0.0 if abs(mean) > rounding else 1.0)
    test = ttest_rel(mine, other)
    low, high = test.confidence_interval(CONFIDENCE)
    return SeedComparison(Difference(mean, float(low), float(high)), float(test.pvalue))


def sign_test(won: int, lost: int) -> float:
    """The exact two-sided p value of so many rows won and lost, if either were as likely; 1.0 for none."""
    from scipy.stats import binomtest

    return float(binomtest(won, won + lost).pvalue) if won + lost else 1.0


def _measure(counts: Ids, gold: NDArray[np.intp], predicted: NDArray[np.intp], num_labels: int) -> Floats:
    """Accuracy and macro-F1 (R, 2), as `classification_metrics` has them, of R tables of counts (R, K) whose
    cells have these ids (K,)."""
    classes = np.eye(num_labels)
    right = counts @ (classes[gold] * (gold == predicted)[:, None])  # (R, C)
    occurs = counts @ (classes[gold] + classes[predicted])  # (R, C), in gold and in predicted
    f1 = np.divide(2 * right, occurs, out=np.zeros_like(right), where=occurs > 0)
    macro = f1.sum(axis=1) / (occurs > 0).sum(axis=1)
    return np.stack([right.sum(axis=1) / counts.sum(axis=1), macro], axis=1)


def _replicates(counts: Ids, measure: Callable[[Ids], Floats]) -> Floats:
    """What `measure` makes of REPLICATES draws of the rows that are counted by cell (K,)."""
    generator, n = np.random.default_rng(0), counts.sum()
    drawn = (generator.multinomial(n, counts / n, size=part) for part in _parts(len(counts)))
    return np.concatenate([measure(each) for each in drawn])


def _parts(width: int) -> list[int]:
    """How many replicates to draw at once, draw by draw, when each needs so many numbers."""
    size = max(1, NUMBERS_AT_ONCE // width)
    return [min(size, REPLICATES - start) for start in range(0, REPLICATES, size)]


def _accelerations(matrix: Ids) -> Floats:
    """Of accuracy and macro-F1: a sixth of the skewness of what single rows add to them (Efron 1987)."""
    gold, predicted = np.nonzero(matrix)
    counts, is_right = matrix[gold, predicted], gold == predicted
    occurs = np.maximum(matrix.sum(axis=0) + matrix.sum(axis=1), 1)
    slope = 2 * np.diag(matrix) / occurs**2  # of F1 in `occurs`
    shares = is_right - np.trace(matrix) / counts.sum()
    added = np.stack([shares, 2 * is_right / occurs[gold] - slope[gold] - slope[predicted]])  # (2, K)
    cubes, squares = added**3 @ counts, added**2 @ counts
    skewness: Floats = np.divide(cubes, squares**1.5, out=np.zeros(2), where=squares > 0)
    return skewness / 6


def _interval(drawn: Floats, value: float, acceleration: float) -> tuple[float, float]:
    """The BCa interval (Efron 1987): percentiles, corrected for bias and skewness. Plain percentiles miss a
    macro-F1 with a class of few rows in up to 9 of 100 data sets (benchmarks/significance.py)."""
    from scipy.special import ndtr, ndtri

    below = (np.mean(drawn < value) + np.mean(drawn <= value)) / 2
    bias = ndtri(np.clip(below, 1 / REPLICATES, 1 - 1 / REPLICATES))
    moved = bias + ndtri([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    low, high = np.quantile(drawn, ndtr(bias + moved / (1 - acceleration * moved)))
    return float(low), float(high)


def _difference(drawn: Floats, value: float) -> Difference:
    """A symmetric interval. If it is luck alone, either sign is as likely; percentiles call too many
    differences in macro-F1 real where a few rows of a rare class decide (benchmarks/significance.py)."""
    reach = float(np.quantile(np.abs(drawn - value), CONFIDENCE))
    # Accuracy moves in steps, so an end is often 0: rounding must not put it on the other side.
    low, high = (0.0 if abs(end) <= 1e-9 * reach else end for end in (value - reach, value + reach))
    return Difference(value, low, high)
