"""Intervals and tests against scikit-learn, scipy and a bootstrap that draws row after row."""

import math

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from numpy.typing import NDArray

from bertpair.evaluation import significance
from bertpair.evaluation.metrics import classification_metrics, confusion_matrix
from bertpair.evaluation.significance import (
    bootstrap_intervals,
    compare_labels,
    compare_seeds,
    compare_values,
    sign_test,
)

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]


def random_rows(random: np.random.Generator, n: int, num_labels: int) -> tuple[Ids, Ids, Ids]:
    """Gold and the ids of two models that often agree."""
    shares = random.dirichlet(np.full(num_labels, 2.0))
    gold, guesses, others = (random.choice(num_labels, n, p=shares) for _ in range(3))
    ours = np.where(random.random(n) < 0.75, gold, guesses)
    return gold, ours, np.where(random.random(n) < 0.6, ours, others)


def figures(gold: Ids, predicted: Ids) -> Floats:
    """Accuracy and macro-F1."""
    metrics = classification_metrics(gold, predicted, 4)
    return np.array([metrics["acc"], metrics["macro_f1"]])


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "is_rare"), [(0, False), (1, False), (2, True), (3, True)])
def test_intervals_are_those_of_rows_drawn_one_by_one(seed: int, is_rare: bool) -> None:
    random = np.random.default_rng(seed)
    gold, ours, theirs = random_rows(random, n := 60, 3)
    if is_rare:  # a class of one row, right in one model: a third of the draws are without it
        gold[0] = ours[0] = 3
    mine, other = np.empty((2, 2000, 2))
    for k in range(2000):
        rows = random.integers(n, size=n)
        mine[k], other[k] = figures(gold[rows], ours[rows]), figures(gold[rows], theirs[rows])
    accuracy = sklearn.metrics.accuracy_score(gold[rows], ours[rows])
    macro = sklearn.metrics.f1_score(gold[rows], ours[rows], average="macro", zero_division=0.0)
    np.testing.assert_allclose(mine[-1], [accuracy, macro], rtol=1e-12)
    intervals = bootstrap_intervals(confusion_matrix(gold, ours, 4))
    compared = compare_labels(gold, ours, theirs, 4)
    assert list(intervals) == list(compared.differences) == ["acc", "macro_f1"]
    for k, name in enumerate(intervals):
        step = 1.01 / n if name == "acc" else 0.0  # the least by which accuracy can change
        expected = scipy.stats.bootstrap(
            (gold, ours),
            lambda gold, ours, k=k: figures(gold, ours)[k],
            paired=True,
            vectorized=False,
            n_resamples=2000,
            method="BCa",
            rng=random,
        )
        noise = step + 0.25 * expected.standard_error
        np.testing.assert_allclose(intervals[name], expected.confidence_interval, atol=noise)
        difference, moved = compared.differences[name], mine[:, k] - other[:, k]
        value = figures(gold, ours)[k] - figures(gold, theirs)[k]
        assert difference.value == pytest.approx(value, abs=1e-12)
        reach = np.quantile(np.abs(moved - value), 0.95)
        noise = step + 0.2 * moved.std()
        np.testing.assert_allclose(difference[1:], [value - reach, value + reach], atol=noise)


def test_the_interval_of_accuracy_is_the_binomial_one() -> None:
    for right, n in ((130, 200), (700, 1000), (9000, 10000)):
        low, high = bootstrap_intervals(np.array([[right, n - right], [0, 0]]))["acc"]
        spread = scipy.stats.binom.std(n, right / n) / n
        expected = np.array(scipy.stats.binom.interval(0.95, n, right / n)) / n
        np.testing.assert_allclose([low, high], expected, atol=0.3 * spread)


def test_values_lie_in_their_intervals() -> None:
    random = np.random.default_rng(0)
    for _ in range(40):
        num_labels, n = int(random.integers(2, 20)), int(random.integers(1, 80))
        gold, ours, theirs = random_rows(random, n, num_labels)
        metrics = classification_metrics(gold, ours, num_labels)
        for name, (low, high) in bootstrap_intervals(confusion_matrix(gold, ours, num_labels)).items():
            assert 0 <= low <= metrics[name] <= high <= 1
        compared = compare_labels(gold, ours, theirs, num_labels)
        for name, (value, low, high) in compared.differences.items():
            other = classification_metrics(gold, theirs, num_labels)[name]
            assert value == metrics[name] - other and low <= value <= high


def test_an_end_at_zero_is_not_missed_by_rounding() -> None:
    random, at_zero = np.random.default_rng(8), 0
    for _ in range(100):
        _, low, high = compare_labels(*random_rows(random, 10, 3), 3).differences["acc"]
        assert all(end == 0 or abs(end) > 1e-9 for end in (low, high))
        at_zero += low == 0 < high or low < 0 == high
    assert at_zero > 5


def test_labels_without_rows_change_nothing() -> None:
    gold, ours, theirs = random_rows(np.random.default_rng(1), 60, 3)
    few, many = (compare_labels(gold, ours, theirs, num_labels) for num_labels in (3, 7))
    assert few == many
    few, many = (bootstrap_intervals(confusion_matrix(gold, ours, num_labels)) for num_labels in (3, 7))
    assert few == many


def test_draws_do_not_depend_on_how_many_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(2)
    gold, ours, theirs = random_rows(random, 50, 4)
    values = random.normal(size=(3, 50))
    matrix = confusion_matrix(gold, ours, 4)
    whole = bootstrap_intervals(matrix), compare_labels(gold, ours, theirs, 4), compare_values(*values)
    monkeypatch.setattr(significance, "NUMBERS_AT_ONCE", 777)
    assert whole == (
        bootstrap_intervals(matrix),
        compare_labels(gold, ours, theirs, 4),
        compare_values(*values),
    )


@pytest.mark.parametrize("gold", [[0, 1, 2, 2], [1, 1, 1], [2]])
def test_what_is_all_right_or_all_wrong_has_no_width(gold: list[int]) -> None:
    wrong = [(each + 1) % 3 for each in gold]
    for predicted, value in ((gold, 1.0), (wrong, 0.0)):
        found = bootstrap_intervals(confusion_matrix(gold, predicted, 3))
        assert found == {"acc": (value, value), "macro_f1": (value, value)}
    won, lost, p_value, differences = compare_labels(gold, gold, wrong, 3)
    assert (won, lost, p_value) == (len(gold), 0, min(1.0, 2 * 0.5 ** len(gold)))
    assert differences == {"acc": (1.0, 1.0, 1.0), "macro_f1": (1.0, 1.0, 1.0)}


def test_equal_models_do_not_differ() -> None:
    gold, ours, _ = random_rows(np.random.default_rng(3), 70, 3)
    nothing = (0.0, 0.0, 0.0)
    assert compare_labels(gold, ours, ours, 3) == (0, 0, 1.0, {"acc": nothing, "macro_f1": nothing})
    assert compare_values(gold, ours, ours) == (0, 0, 1.0, {"loss": nothing})


def test_rows_won_and_lost_are_counted_one_by_one() -> None:
    random = np.random.default_rng(4)
    for _ in range(20):
        gold, ours, theirs = random_rows(random, int(random.integers(1, 300)), 5)
        rows = list(zip(gold, ours, theirs, strict=True))
        won = sum(mine == truth != other for truth, mine, other in rows)
        lost = sum(mine != truth == other for truth, mine, other in rows)
        compared = compare_labels(gold, ours, theirs, 5)
        assert (compared.won, compared.lost) == (won, lost)
        swapped = compare_labels(gold, theirs, ours, 5)
        assert (swapped.won, swapped.lost, swapped.p_value) == (lost, won, compared.p_value)


def test_the_sign_test_is_exact() -> None:
    for won in range(25):
        for lost in range(25):
            n, k = won + lost, min(won, lost)
            tail = sum(math.comb(n, j) for j in range(k + 1)) / 2**n
            assert sign_test(won, lost) == pytest.approx(min(1.0, 2 * tail), rel=1e-12)
    assert sign_test(50_300, 49_700) == pytest.approx(
        2 * scipy.stats.binom.cdf(49_700, 100_000, 0.5), rel=1e-9
    )


def test_an_id_that_is_no_label_is_refused() -> None:
    for ids in ([0, 3], [0, -1]):
        with pytest.raises(ValueError):
            compare_labels([0, 1], ids, [0, 1], 3)


@pytest.mark.parametrize("seed", range(3))
def test_values_are_compared_as_rows_drawn_one_by_one_say(seed: int) -> None:
    random = np.random.default_rng(seed)
    gold = random.uniform(0, 5, n := 80).round(1)
    ours, theirs = (gold + random.normal(size=n).round(1) for _ in range(2))  # with ties
    smaller = [abs(a - g) < abs(b - g) for g, a, b in zip(gold, ours, theirs, strict=True)]
    larger = [abs(a - g) > abs(b - g) for g, a, b in zip(gold, ours, theirs, strict=True)]
    won, lost, p_value, differences = compare_values(gold, ours, theirs)
    assert (won, lost) == (sum(smaller), sum(larger))
    assert p_value == pytest.approx(scipy.stats.binomtest(won, won + lost).pvalue)
    drawn = np.empty(2000)
    for k in range(2000):
        rows = random.integers(n, size=n)
        drawn[k] = np.mean((ours - gold)[rows] ** 2) - np.mean((theirs - gold)[rows] ** 2)
    expected = sklearn.metrics.mean_squared_error(gold, ours) - sklearn.metrics.mean_squared_error(
        gold, theirs
    )
    value, low, high = differences["loss"]
    assert value == pytest.approx(expected, rel=1e-12)
    reach = np.quantile(np.abs(drawn - expected), 0.95)
    np.testing.assert_allclose([low, high], [value - reach, value + reach], atol=0.3 * drawn.std())


def test_the_scale_of_values_scales_the_difference_in_loss() -> None:
    values = np.random.default_rng(5).normal(size=(3, 40))
    for scale in (2.0**-60, 2.0**60):
        small, large = compare_values(*values), compare_values(*values * scale)
        assert large[:3] == small[:3]
        assert large.differences["loss"] == tuple(x * scale**2 for x in small.differences["loss"])


def test_seeds_are_compared_by_the_paired_t_test() -> None:
    random = np.random.default_rng(6)
    for n in (2, 3, 5, 20):
        ours, theirs = random.normal(0.8, 0.02, n), random.normal(0.79, 0.02, n)
        (value, low, high), p_value = compare_seeds(ours.tolist(), theirs.tolist())
        gains = ours - theirs
        assert p_value == pytest.approx(scipy.stats.ttest_1samp(gains, 0).pvalue, rel=1e-9)
        reach = scipy.stats.t.ppf(0.975, n - 1) * np.std(gains, ddof=1) / np.sqrt(n)
        np.testing.assert_allclose(
            [value, low, high], [gains.mean(), gains.mean() - reach, gains.mean() + reach]
        )
        assert (p_value < 0.05) == (not low <= 0 <= high)


def test_seeds_that_all_differ_alike_have_no_spread() -> None:
    difference, p_value = compare_seeds([0.81, 0.91, 0.3], [0.8, 0.9, 0.29])  # alike but for rounding
    assert p_value == 0.0 and difference.low == difference.value == difference.high == pytest.approx(0.01)
    assert compare_seeds([0.5, 0.1 + 0.2], [0.5, 0.3]).p_value == 1.0
    assert compare_seeds([0.7, 0.7], [0.7, 0.7]) == ((0.0, 0.0, 0.0), 1.0)
    assert compare_seeds([0.0, 0.0], [0.0, 0.0]) == ((0.0, 0.0, 0.0), 1.0)


@pytest.mark.parametrize(("ours", "theirs"), [([0.5], [0.4]), ([0.5, 0.6], [0.4]), ([], [])])
def test_seeds_come_in_pairs_and_more_than_one(ours: list[float], theirs: list[float]) -> None:
    with pytest.raises(AssertionError):
        compare_seeds(ours, theirs)


def test_many_rows_and_labels_are_no_burden() -> None:
    gold, ours, theirs = random_rows(np.random.default_rng(7), 10_000, 40)
    compared = compare_labels(gold, ours, theirs, 40)
    for low, high in bootstrap_intervals(confusion_matrix(gold, ours, 40)).values():
        assert 0 < high - low < 0.05
    assert compared.won > compared.lost and compared.p_value < 1e-6 and compared.differences["acc"].low > 0
