"""Kappa, AUC, average precision and the figures of groups, against loops; ties and empty classes included."""

import itertools

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support

from bertpair.evaluation.figures import (
    SEEN,
    UNSEEN,
    class_figures,
    group_figures,
    interval_figures,
    ranking_figures,
    weighted_kappa,
)
from bertpair.evaluation.metrics import confusion_matrix

SEEDS = range(8)
LABELS = ["wrong", "partly", "right", "never"]


def draw(seed: int, num_rows: int = 80) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels of three of four classes, what was chosen, and probabilities with ties."""
    rng = np.random.default_rng([18, seed])
    gold = rng.choice(3, num_rows, p=[0.6, 0.1, 0.3])
    weights = rng.integers(1, 5, (num_rows, 4)) + 4 * np.eye(4)[gold] * rng.integers(0, 2, (num_rows, 1))
    probabilities = weights / weights.sum(axis=1, keepdims=True)
    return gold, probabilities.argmax(axis=1), probabilities


@pytest.mark.parametrize("seed", SEEDS)
def test_kappa_equals_a_loop(seed: int) -> None:
    gold, chosen, _ = draw(seed)
    ranks = np.random.default_rng(seed).permutation(4)
    seen = expected = 0.0
    for a, b in zip(gold, chosen, strict=True):
        seen += (ranks[a] - ranks[b]) ** 2
    for a, b in itertools.product(gold, chosen):
        expected += (ranks[a] - ranks[b]) ** 2 / len(gold)
    assert weighted_kappa(gold, chosen, ranks) == pytest.approx(1 - seen / expected)


def test_kappa_of_what_is_always_the_same_is_zero() -> None:
    same = np.ones(5, int)
    assert weighted_kappa(same, same, (0, 1, 2)) == 0.0
    assert weighted_kappa(np.arange(3), np.arange(3), (0, 1, 2)) == 1.0
    assert weighted_kappa(np.arange(3), np.arange(3)[::-1], (0, 1, 2)) == pytest.approx(-1.0)


def brute_auc(is_gold: np.ndarray, scores: np.ndarray) -> float:
    """The share of pairs of a row with the label and one without that the scores put in this order."""
    pairs = list(itertools.product(scores[is_gold], scores[~is_gold]))
    return sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)


def brute_ap(is_gold: np.ndarray, scores: np.ndarray) -> float:
    """The sum over thresholds of the precision there, times by how much recall grows."""
    found, last = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        chosen = scores >= threshold
        recall = (chosen & is_gold).sum() / is_gold.sum()
        found += (recall - last) * (chosen & is_gold).sum() / chosen.sum()
        last = recall
    return found


@pytest.mark.parametrize("seed", SEEDS)
def test_auc_and_average_precision_equal_brute_force(seed: int) -> None:
    gold, _, probabilities = draw(seed)
    figures = ranking_figures(gold, probabilities, LABELS)
    assert figures.pop("never") == {"auc": None, "ap": None}
    for number, each in enumerate(figures.values()):
        is_gold, scores = gold == number, probabilities[:, number]
        assert each["auc"] == pytest.approx(brute_auc(is_gold, scores))
        assert each["ap"] == pytest.approx(brute_ap(is_gold, scores))


def test_probabilities_that_are_nan_have_no_ranking() -> None:
    gold, _, probabilities = draw(1)
    probabilities[3] = np.nan
    assert ranking_figures(gold, probabilities, LABELS)["right"] == {"auc": None, "ap": None}


def test_a_class_of_all_rows_has_no_ranking() -> None:
    gold = np.zeros(4, int)
    figures = ranking_figures(gold, np.full((4, 2), 0.5), ["a", "b"])
    assert figures == {"a": {"auc": None, "ap": None}, "b": {"auc": None, "ap": None}}


@pytest.mark.parametrize("seed", SEEDS)
def test_class_figures_equal_scikit_learn(seed: int) -> None:
    gold, chosen, _ = draw(seed)
    figures = class_figures(confusion_matrix(gold, chosen, 4), LABELS)
    wanted = precision_recall_fscore_support(gold, chosen, labels=range(4), zero_division=0)
    assert list(figures) == LABELS
    for each, values in zip(figures.values(), zip(*wanted, strict=True), strict=True):
        assert list(each) == ["precision", "recall", "f1", "rows"]
        assert list(each.values()) == pytest.approx(list(values))


def test_intervals_hold_their_figures() -> None:
    gold, chosen, _ = draw(2)
    ends = interval_figures(confusion_matrix(gold, chosen, 4).tolist())
    assert set(ends) == {"acc_low", "acc_high", "macro_f1_low", "macro_f1_high"}
    assert ends["acc_low"] < (gold == chosen).mean() < ends["acc_high"]
    assert ends["macro_f1_low"] < f1_score(gold, chosen, average="macro") < ends["macro_f1_high"]


@pytest.mark.parametrize("seed", SEEDS)
def test_groups_equal_a_loop(seed: int) -> None:
    gold, chosen, _ = draw(seed)
    groups = [f"q{n}" for n in np.random.default_rng(seed).integers(0, 6, len(gold))]
    lines = group_figures(groups, gold, chosen, 4, {"q1", "q3"})
    assert [line["group"] for line in lines[:2]] == [SEEN, UNSEEN]
    assert {line["group"] for line in lines[2:]} == set(groups)
    counts = [line["rows"] for line in lines[2:]]
    assert counts == sorted(counts, reverse=True) and sum(counts) == len(gold)
    halves = {SEEN: {"q1", "q3"}, UNSEEN: {"q0", "q2", "q4", "q5"}}
    for line in lines:
        rows = np.array([group in halves.get(line["group"], {line["group"]}) for group in groups])
        assert line["rows"] == rows.sum()
        assert line["acc"] == pytest.approx(accuracy_score(gold[rows], chosen[rows]))
        wanted = f1_score(gold[rows], chosen[rows], average="macro", zero_division=0)
        assert line["macro_f1"] == pytest.approx(wanted)


def test_groups_of_values_have_an_error_and_a_correlation() -> None:
    gold, values = np.array([1.0, 2.0, 3.0, 5.0]), np.array([1.5, 2.0, 2.0, 4.0])
    lines = group_figures(["a", "b", "a", "a"], gold, values, None)
    assert [line["group"] for line in lines] == ["a", "b"]
    assert lines[0]["mean_error"] == pytest.approx(2.5 / 3)
    assert lines[0]["pearson"] == pytest.approx(np.corrcoef([1, 3, 5], [1.5, 2, 4])[0, 1])
    assert lines[1] == {"group": "b", "rows": 1, "mean_error": 0.0, "pearson": 0.0}
