"""Every figure of an evaluation, down to classes and groups, as plain values: what figures.json holds.

AUC, average precision and kappa are scikit-learn's, which is imported only where they are asked for.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bertpair.evaluation.calibration import Floats, Ids
from bertpair.evaluation.metrics import classification_metrics, finite_or_null, per_class, regression_metrics
from bertpair.evaluation.significance import bootstrap_intervals

CLASS_FIGURES = ("precision", "recall", "f1", "auc", "ap", "rows")
SEEN, UNSEEN = "groups seen in training", "groups not seen in training"


def weighted_kappa(gold: Ids, chosen: Ids, ranks: Sequence[int]) -> float:
    """Cohen's kappa with quadratic weights, for ids whose places in their order are `ranks`; 0.0 where it is
    not defined: all rows have one and the same label, and are given it."""
    from sklearn.metrics import cohen_kappa_score

    places = np.asarray(ranks)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        kappa = cohen_kappa_score(
            places[gold], places[chosen], labels=np.arange(len(places)), weights="quadratic"
        )
    return float(kappa) if np.isfinite(kappa) else 0.0


def class_figures(matrix: npt.ArrayLike, labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`precision recall f1 rows` of each label, from the counts (C, C)."""
    columns = zip(*(each.tolist() for each in per_class(np.asarray(matrix))), strict=True)
    names = ("precision", "recall", "f1", "rows")
    return {
        label: dict(zip(names, values, strict=True)) for label, values in zip(labels, columns, strict=True)
    }


def ranking_figures(gold: Ids, probabilities: Floats, labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`auc ap` of each label against all others: how well its probability sorts the rows; None where all rows
    have it or none does, or a probability is NaN."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    figures: dict[str, dict[str, Any]] = {}
    for number, label in enumerate(labels):
        is_gold, scores = gold == number, probabilities[:, number]
        figures[label] = {"auc": None, "ap": None}
        if 0 < is_gold.sum() < len(gold) and np.isfinite(scores).all():
            auc, ap = roc_auc_score(is_gold, scores), average_precision_score(is_gold, scores)
            figures[label] = {"auc": float(auc), "ap": float(ap)}
    return figures


def interval_figures(matrix: npt.ArrayLike) -> dict[str, float]:
    """The ends of 95 % intervals, `acc_low acc_high macro_f1_low macro_f1_high`, from the counts (C, C)."""
    ends: dict[str, float] = {}
    for name, (low, high) in bootstrap_intervals(np.asarray(matrix)).items():
        ends |= {f"{name}_low": low, f"{name}_high": high}
    return ends


def group_figures(
    groups: Sequence[str],
    gold: npt.NDArray[Any],
    found: npt.NDArray[Any],
    num_labels: int | None,
    known: Collection[str] | None = None,
) -> list[dict[str, Any]]:
    """The figures of each group, those with most rows first: of label ids, or of values where `num_labels` is
    None. With `known`, the groups of the training data, two lines go first: of those and all others."""
    rows_of: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        rows_of.setdefault(group, []).append(row)
    parts = sorted(rows_of.items(), key=lambda part: -len(part[1]))
    if known is not None:
        is_known = [group in known for group in groups]
        halves = (np.flatnonzero(np.equal(is_known, seen)).tolist() for seen in (True, False))
        parts = [part for part in zip((SEEN, UNSEEN), halves, strict=True) if part[1]] + parts
    return [
        {"group": name, "rows": len(rows), **finite_or_null(_measures(gold[rows], found[rows], num_labels))}
        for name, rows in parts
    ]


def _measures(gold: npt.NDArray[Any], found: npt.NDArray[Any], num_labels: int | None) -> dict[str, float]:
    if num_labels is None:
        error = float(np.abs(gold - found).mean())
        return {"mean_error": error, "pearson": regression_metrics(gold, found)["pearson"]}
    metrics = classification_metrics(gold, found, num_labels)
    return {name: metrics[name] for name in ("acc", "macro_f1")}
