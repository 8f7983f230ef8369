"""Temperatures, thresholds and the calibration error, against scipy, scikit-learn and loops."""

import json
import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn.metrics import f1_score

from bertpair import DataError
from bertpair.evaluation.calibration import NUM_BINS, Decision, at_temperature, calibration_bins
from bertpair.evaluation.fit import best_threshold, fit_temperature
from bertpair.evaluation.scorer import softmax

SEEDS = range(6)


def draw(seed: int, num_rows: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Logits (rows, C) that are too sure, and labels drawn from the probabilities that they should have."""
    rng = np.random.default_rng([16, seed])
    logits = rng.normal(size=(num_rows, 2 + seed % 4))
    gold = np.array([rng.choice(len(row), p=row) for row in softmax(logits.astype(np.float32))])
    return (logits * rng.uniform(0.3, 4)).astype(np.float32), gold


@pytest.mark.parametrize("seed", SEEDS)
def test_the_temperature_is_the_one_with_the_least_loss(seed: int) -> None:
    logits, gold = draw(seed)

    def loss(temperature: float) -> float:
        return -log_softmax(logits.astype(np.float64) / temperature, axis=1)[
            np.arange(len(gold)), gold
        ].mean()

    wanted = minimize_scalar(loss, bounds=(0.01, 100), method="bounded", options={"xatol": 1e-10})
    assert fit_temperature(logits, gold) == pytest.approx(wanted.x, rel=1e-5)
    assert fit_temperature(logits * 3, gold) == pytest.approx(3 * wanted.x, rel=1e-5)


def test_rows_without_a_temperature_are_refused() -> None:
    logits, _ = draw(1)
    with pytest.raises(DataError, match="no row of them is wrong"):
        fit_temperature(logits, logits.argmax(axis=1))
    with pytest.raises(DataError, match="no better than chance"):
        fit_temperature(logits, logits.argmin(axis=1))


def test_scaling_keeps_the_order_and_a_temperature_of_one_changes_nothing() -> None:
    logits, _ = draw(3)
    assert np.array_equal(Decision(temperature=1.0).scale(logits), logits)
    scaled = Decision(temperature=2.5).scale(logits)
    assert np.array_equal(scaled.argmax(axis=1), logits.argmax(axis=1))
    assert softmax(scaled).max() < softmax(logits).max()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("has_ties", [False, True])
def test_the_threshold_has_the_best_f1_of_all(seed: int, has_ties: bool) -> None:
    rng = np.random.default_rng([17, seed])
    is_gold = rng.random(60) < 0.4
    scores = np.clip(0.4 * is_gold + rng.random(60) * 0.8, 0, 1)
    scores = scores.round(1) if has_ties else scores
    threshold, f1 = best_threshold(scores, is_gold)
    tried = [f1_score(is_gold, scores >= each) for each in np.unique(scores)]
    assert f1 == pytest.approx(max(tried))
    assert f1_score(is_gold, scores >= threshold) == pytest.approx(f1)
    assert threshold not in scores or threshold == 0


def test_a_threshold_needs_a_row_of_its_label() -> None:
    with pytest.raises(DataError, match="no row has the label"):
        best_threshold(np.array([0.2, 0.7]), np.array([False, False]))
    assert best_threshold(np.array([0.2, 0.7]), np.array([True, True])) == (pytest.approx(0.1), 1.0)


@pytest.mark.parametrize("positive", [0, 1])
def test_a_threshold_decides_alike_at_any_temperature(positive: int) -> None:
    logits, _ = draw(0, 2000)
    hot = Decision(temperature=2.0, threshold=0.3, positive=positive)
    cold = Decision(threshold=at_temperature(0.3, 2.0, 1.0), positive=positive)
    chosen = hot.choose(hot.scale(logits))
    assert np.array_equal(chosen, cold.choose(cold.scale(logits)))
    assert np.array_equal(chosen == positive, softmax(hot.scale(logits))[:, positive] >= 0.3)
    assert at_temperature(0.0, 2.0, 1.0) == 0.0 and at_temperature(1.0, 2.0, 1.0) == 1.0


@pytest.mark.parametrize("seed", SEEDS)
def test_the_calibration_error_equals_a_loop(seed: int) -> None:
    logits, gold = draw(seed)
    probabilities, chosen = softmax(logits), logits.argmax(axis=1)
    bins = calibration_bins(probabilities, chosen, gold)
    error = 0.0
    for number in range(NUM_BINS):
        low, high = number / NUM_BINS, (number + 1) / NUM_BINS
        rows = [
            row
            for row, confidence in enumerate(probabilities.max(axis=1))
            if low <= confidence < high or (confidence == 1 and number == NUM_BINS - 1)
        ]
        assert bins.rows[number] == len(rows)
        if not rows:
            assert math.isnan(bins.confidence[number]) and math.isnan(bins.accuracy[number])
            continue
        confidence, accuracy = probabilities.max(axis=1)[rows].mean(), (chosen == gold)[rows].mean()
        assert bins.confidence[number] == pytest.approx(confidence)
        assert bins.accuracy[number] == pytest.approx(accuracy)
        error += len(rows) / len(gold) * abs(confidence - accuracy)
    assert bins.error == pytest.approx(error)


def test_perfect_confidence_has_no_error() -> None:
    bins = calibration_bins(np.eye(3)[[0, 1, 2, 1]], np.array([0, 1, 2, 1]), np.array([0, 1, 2, 1]))
    assert bins.error == 0 and bins.rows[-1] == 4


def test_parts_are_plain_values_also_where_a_probability_is_nan() -> None:
    logits, gold = draw(4)
    probabilities = softmax(logits)
    probabilities[3] = np.nan
    bins = calibration_bins(probabilities, logits.argmax(axis=1), gold)
    parts = bins.as_dicts()
    assert json.loads(json.dumps(parts, allow_nan=False)) == parts and len(parts) == NUM_BINS
    assert sum(part["rows"] for part in parts) == len(gold) and math.isnan(bins.error)
    assert all(part["accuracy"] is None for part in parts if not part["rows"])
