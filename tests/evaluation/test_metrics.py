"""The measures against scikit-learn and scipy on fresh random inputs."""

import warnings

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from numpy.typing import NDArray

from bertpair.evaluation.metrics import (
    classification_metrics,
    confusion_matrix,
    is_better,
    pearson,
    per_class,
    regression_metrics,
    spearman,
)

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]


@pytest.fixture
def random() -> np.random.Generator:
    seed = np.random.SeedSequence().entropy
    print(f"seed {seed}")  # shown if the test fails
    return np.random.default_rng(seed)


def random_classes(random: np.random.Generator) -> tuple[Ids, Ids, int]:
    """Gold and predicted ids; classes may be absent from either or both, gold may be of one class."""
    num_labels = int(random.integers(2, 9))
    n = int(random.integers(1, 60))
    weights = random.dirichlet(np.full(num_labels, 0.3))
    gold = random.choice(num_labels, n, p=weights)
    guesses = random.choice(num_labels, n, p=random.dirichlet(np.full(num_labels, 0.3)))
    return gold, np.where(random.random(n) < random.random(), gold, guesses), num_labels


@pytest.mark.slow
def test_class_measures_match_sklearn(random: np.random.Generator) -> None:
    for _ in range(150):
        gold, predicted, num_labels = random_classes(random)
        labels = list(range(num_labels))
        matrix = sklearn.metrics.confusion_matrix(gold, predicted, labels=labels)
        assert np.array_equal(confusion_matrix(gold, predicted, num_labels), matrix)
        ours = per_class(confusion_matrix(gold, predicted, num_labels))
        theirs = sklearn.metrics.precision_recall_fscore_support(
            gold, predicted, labels=labels, zero_division=0.0
        )
        for mine, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(mine, other, rtol=1e-14)
        with warnings.catch_warnings():  # the oracles warn where they divide by zero
            warnings.simplefilter("ignore")
            macro = sklearn.metrics.f1_score(gold, predicted, average="macro", zero_division=0.0)
            mcc = sklearn.metrics.matthews_corrcoef(gold, predicted)
        expected = {
            "acc": sklearn.metrics.accuracy_score(gold, predicted),
            "macro_f1": macro,
            "mcc": mcc,
            "n": len(gold),
        }
        if num_labels == 2:
            expected["f1"] = sklearn.metrics.f1_score(gold, predicted, pos_label=1, zero_division=0.0)
            for positive in (0, 1):
                f1 = sklearn.metrics.f1_score(gold, predicted, pos_label=positive, zero_division=0)
                found = classification_metrics(gold, predicted, 2, positive)["f1"]
                assert found == pytest.approx(f1, rel=1e-14)
        metrics = classification_metrics(gold, predicted, num_labels)
        assert metrics == pytest.approx(expected, rel=1e-12, abs=1e-14)


def random_values(random: np.random.Generator) -> tuple[Floats, Floats]:
    """Two related columns, with ties as often as not, of any magnitude."""
    n = int(random.integers(2, 200))
    gold = random.normal(size=n)
    values = gold * random.normal() + random.normal(size=n)
    if random.random() < 0.5:
        gold, values = gold.round(1), values.round()
    return gold * 10.0 ** random.integers(-8, 8), values * 10.0 ** random.integers(-8, 8) + random.normal()


def test_correlations_match_scipy(random: np.random.Generator) -> None:
    compared = 0
    while compared < 150:
        gold, values = random_values(random)
        if np.ptp(gold) < 1e-6 * np.abs(gold).max() or np.ptp(values) < 1e-6 * np.abs(values).max():
            continue  # scipy warns about nearly constant columns, or gives NaN for constant ones
        linear, ranked = scipy.stats.pearsonr(gold, values), scipy.stats.spearmanr(gold, values)
        metrics = regression_metrics(gold, values)
        assert metrics["pearson"] == pytest.approx(linear.statistic, abs=1e-8)
        assert metrics["spearmanr"] == pytest.approx(ranked.statistic, abs=1e-12)
        assert metrics["corr"] == (metrics["pearson"] + metrics["spearmanr"]) / 2
        assert metrics["n"] == len(gold) and isinstance(metrics["n"], int)
        compared += 1


def test_pearson_is_as_exact_as_scipy_on_usual_scores(random: np.random.Generator) -> None:
    for _ in range(50):
        gold = random.uniform(0, 5, size=300).round(1)
        values = (gold + random.normal(size=300)).astype(np.float32)
        expected = scipy.stats.pearsonr(gold, values.astype(np.float64)).statistic
        assert pearson(gold, values) == pytest.approx(expected, abs=1e-13)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e300, -3.7])
def test_constant_values_give_zero_without_a_warning(constant: float) -> None:
    varied, same = np.arange(7) / 3, np.full(7, constant)
    for gold, values in ((varied, same), (same, varied), (same, same), ([2.0], [3.0])):
        assert regression_metrics(gold, values) == {
            "pearson": 0.0,
            "spearmanr": 0.0,
            "corr": 0.0,
            "n": len(gold),
        }


@pytest.mark.parametrize("scale", [1e-310, 1e-200, 1e200, 1e307])
def test_correlations_do_not_overflow_or_vanish(scale: float) -> None:
    values = np.array([1.0, 2.0, 4.0, 3.0])
    assert pearson(values, values * scale) == pytest.approx(1.0)
    assert pearson(values, -values * scale) == pytest.approx(-1.0)
    assert spearman(values, values * scale) == pytest.approx(1.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_have_no_correlation(bad: float) -> None:
    measured = regression_metrics([1.0, 2.0, 3.0], [1.0, bad, 2.0])
    assert all(np.isnan(measured[name]) for name in ("pearson", "spearmanr", "corr")) and measured["n"] == 3


def test_lists_and_float32_are_welcome() -> None:
    assert classification_metrics([0, 1, 1], np.array([0, 1, 0], np.int8), 2)["acc"] == pytest.approx(2 / 3)
    assert pearson(np.array([1, 2, 3], dtype=np.float32), [2, 4, 6]) == pytest.approx(1.0)


def test_less_loss_and_more_of_all_else_is_better() -> None:
    assert is_better("loss", 0.5, 0.6) and not is_better("loss", 0.6, 0.5)
    assert is_better("acc", 0.6, 0.5) and not is_better("acc", 0.5, 0.6)
    assert is_better("acc", -1.0, None) and is_better("loss", 9.0, None)
    assert not is_better("acc", 0.5, 0.5) and not is_better("loss", 0.5, 0.5)
    for metric in ("acc", "loss"):
        assert not is_better(metric, float("nan"), None) and not is_better(metric, float("nan"), 0.5)
        assert is_better(metric, 0.5, float("nan"))


def test_a_million_rows_take_no_time() -> None:
    generator = np.random.default_rng(0)
    gold = generator.integers(0, 40, size=1_000_000)
    predicted = generator.integers(0, 40, size=1_000_000)
    assert classification_metrics(gold, predicted, 40)["n"] == 1_000_000
    assert abs(spearman(gold, generator.normal(size=1_000_000))) < 0.01
