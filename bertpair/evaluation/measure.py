"""One live model on one data set: its logits, its figures, and the files that say so.

Training measures with it on the way and at its end, `evaluate.py` for each model.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bertpair.console import Progress
from bertpair.data.dataset import Split, Targets
from bertpair.errors import plain
from bertpair.evaluation.calibration import AS_TRAINED, Decision, calibration_bins
from bertpair.evaluation.classifier import make_predictions
from bertpair.evaluation.figures import (
    CLASS_FIGURES,
    class_figures,
    group_figures,
    interval_figures,
    ranking_figures,
    weighted_kappa,
)
from bertpair.evaluation.metrics import (
    Ids,
    classification_metrics,
    confusion_matrix,
    finite_or_null,
    regression_metrics,
)
from bertpair.evaluation.openvino import OpenVINOScorer
from bertpair.evaluation.plots import draw_confusion
from bertpair.evaluation.report import format_errors, format_eval_results, format_predictions
from bertpair.evaluation.scorer import Scorer, softmax

POSITIVE = "positive_label"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One data set scored by one model."""

    metrics: dict[str, float]  # empty for a file without labels
    logits: npt.NDArray[np.float32]  # (rows, C), in the file's order, as the model gives them
    positive_label: str | None = None  # that f1 is of
    decision: Decision = AS_TRAINED

    @property
    def figures(self) -> dict[str, float | str]:
        """The metrics, the label that f1 is of, and what the answers were made with besides the model."""
        named = {} if self.positive_label is None or not self.metrics else {POSITIVE: self.positive_label}
        return {**self.metrics, **named, **self.decision.figures}

    @property
    def chosen(self) -> Ids:
        """The id of each row's label, (rows,)."""
        return self.decision.choose(self.decision.scale(self.logits))

    @property
    def probabilities(self) -> npt.NDArray[np.float64]:
        """Of each label, (rows, C)."""
        return softmax(self.decision.scale(self.logits))


def evaluate_split(
    scorer: Scorer | OpenVINOScorer,
    split: Split,
    labels: Sequence[str] | None,
    *,
    positive_label: str | None = None,
    label_ranks: Sequence[int] | None = None,
    decision: Decision = AS_TRAINED,
    label: str = "",
) -> Evaluation:
    """Score every row of `split`, and measure where it has labels.

    `labels` in id order, None for regression; f1 is of `positive_label` (None: of id 1); `label_ranks` as for
    `measure`; `label` leads the progress bar. Raises StoppedError when the stop flag is set.
    """
    with Progress(len(split), "row", label=label, transient=True) as progress:
        logits = scorer.logits(split.tokens, progress.advance)
    if split.targets is None:
        return Evaluation({}, logits, decision=decision)
    metrics = measure(logits, split.targets, labels, positive_label, label_ranks, decision)
    return Evaluation(metrics, logits, positive_label, decision)


def measure(
    logits: npt.NDArray[np.float32],
    gold: Targets,
    labels: Sequence[str] | None,
    positive_label: str | None = None,
    label_ranks: Sequence[int] | None = None,
    decision: Decision = AS_TRAINED,
) -> dict[str, float]:
    """The metrics of logits (rows, C) against label ids, or against values where `labels` is None.

    `loss` is the plain mean cross-entropy (no class weights, no smoothing) or mean squared error. With
    `label_ranks`, the place of each id in the labels' order, quadratic weighted kappa (`qwk`) is one of them.
    """
    scaled = decision.scale(logits)
    wide = scaled.astype(np.float64)
    if labels is None:
        values = wide[:, 0]
        return {"loss": float(np.mean((values - gold) ** 2)), **regression_metrics(gold, values)}
    shifted = wide - wide.max(axis=1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(gold)), gold]
    positive = 1 if positive_label is None else labels.index(positive_label)
    chosen = decision.choose(scaled)
    figures = classification_metrics(gold, chosen, len(labels), positive)
    kappa = {} if label_ranks is None else {"qwk": weighted_kappa(gold, chosen, label_ranks)}
    return {"loss": float(losses.mean()), **figures, **kappa}


@dataclasses.dataclass(frozen=True)
class Details:
    """The figures of an evaluation with gold labels down to classes and groups, as plain values."""

    figures: dict[str, Any]  # flat: what eval_results.json holds
    classes: dict[str, dict[str, Any]] | None  # by label; None for a regression, as the next one
    confusion_matrix: list[list[int]] | None
    groups: list[dict[str, Any]] | None  # None: the rows have none
    calibration: list[dict[str, Any]] | None = None  # None: not asked for

    def as_json(self) -> bytes:
        """figures.json."""
        said = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        said["figures"] = finite_or_null(said["figures"])
        return (json.dumps(said, ensure_ascii=False, indent=1, allow_nan=False) + "\n").encode()


def detail(
    evaluation: Evaluation,
    split: Split,
    labels: Sequence[str] | None,
    known_groups: Collection[str] | None = None,
) -> Details:
    """The figures of `evaluation`, whose `split` has gold labels. `known_groups` are those of the training
    data, where they are known."""
    gold, groups = split.targets, split.pairs.groups
    assert gold is not None
    found = evaluation.logits[:, 0] if labels is None else evaluation.chosen
    num_labels = None if labels is None else len(labels)
    lines = None if groups is None else group_figures(groups, gold, found, num_labels, known_groups)
    if labels is None:
        return Details(evaluation.figures, None, None, lines)
    matrix = confusion_matrix(gold, found, len(labels))
    return Details(evaluation.figures, class_figures(matrix, labels), matrix.tolist(), lines)


def with_further(
    details: Details, evaluation: Evaluation, split: Split, labels: Sequence[str] | None
) -> Details:
    """The same with intervals, with `auc` and `ap` of each class, and with the calibration; of a regression
    as it is."""
    gold, classes, matrix = split.targets, details.classes, details.confusion_matrix
    if labels is None or classes is None or matrix is None or gold is None:
        return details
    chosen, probabilities = evaluation.chosen, evaluation.probabilities
    bins = calibration_bins(probabilities, chosen, gold)
    ranking = ranking_figures(gold, probabilities, labels)
    merged = {label: {**classes[label], **ranking[label]} for label in labels}
    return dataclasses.replace(
        details,
        figures={**details.figures, **interval_figures(matrix), "ece": bins.error},
        classes={label: {name: merged[label][name] for name in CLASS_FIGURES} for label in labels},
        calibration=bins.as_dicts(),
    )


@dataclasses.dataclass(frozen=True)
class Scored:
    """A model's answers for the rows of an evaluation, and where its files are."""

    name: str  # as the user gave it
    path: Path  # of the model
    folder: Path  # of its results
    labels: tuple[str, ...] | None  # in id order; None: regression
    evaluation: Evaluation
    details: Details | None  # None: the rows have no labels
    split: Split

    def answers(self, labels: Sequence[str] | None) -> npt.NDArray[Any]:
        """What it answered for each row: places in `labels`, whatever its own order, or values."""
        if labels is None or self.labels is None:
            return self.evaluation.logits[:, 0]
        return np.array([labels.index(label) for label in self.labels])[self.evaluation.chosen]


def result_files(
    evaluation: Evaluation,
    split: Split,
    labels: Sequence[str] | None,
    details: Details | None,
    *,
    with_texts: bool = False,
) -> dict[str, bytes]:
    """The files of an evaluation, by name: predictions.tsv; with `details`, which gold labels have, also
    eval_results.txt and .json, figures.json, errors.tsv, and for classes confusion_matrix.png."""
    predictions = make_predictions(evaluation.logits, split.tokens, labels, evaluation.decision)
    files = {"predictions.tsv": format_predictions(predictions, split.pairs, labels, with_texts=with_texts)}
    if details is None:
        return files
    files |= format_eval_results(details.figures)
    files["figures.json"] = details.as_json()
    files["errors.tsv"] = format_errors(predictions, split.pairs, wrong_rows(evaluation, split, labels))
    if labels is not None:
        files["confusion_matrix.png"] = draw_confusion(details.confusion_matrix or [], labels)
    return files


def wrong_rows(evaluation: Evaluation, split: Split, labels: Sequence[str] | None) -> Ids:
    """The rows with a wrong label, from the most confident on; of a regression all rows, from the largest
    error on."""
    gold = split.targets
    assert gold is not None
    if labels is None:
        return np.argsort(-np.abs(evaluation.logits[:, 0] - gold), kind="stable")
    chosen = evaluation.chosen
    rows = np.flatnonzero(chosen != gold)
    confidence = evaluation.probabilities[rows, chosen[rows]]
    return rows[np.argsort(-confidence, kind="stable")]


def collapse(evaluation: Evaluation, split: Split, labels: Sequence[str] | None) -> str | None:
    """A line where all rows get one label and not all have it; or None."""
    if labels is None or split.targets is None or not len(split):
        return None
    chosen, share = evaluation.chosen, 0.0
    if (chosen != chosen[0]).any() or (share := float((split.targets == chosen[0]).mean())) == 1:
        return None
    rows, label = f"{len(split):,}", labels[chosen[0]]
    return f"all {rows} rows get the label {plain(label)}, which {100 * share:.1f} % of them have"
