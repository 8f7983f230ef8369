"""From a model and a data set to metrics, and to the files that a person reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bertpair.data.dataset import Split, Targets
from bertpair.evaluation.classifier import Scorer, make_predictions
from bertpair.evaluation.metrics import classification_metrics, confusion_matrix, regression_metrics
from bertpair.evaluation.plots import draw_confusion, draw_curves
from bertpair.evaluation.progress import Progress
from bertpair.evaluation.report import format_eval_results, format_predictions

POSITIVE = "positive_label"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One data set scored by one model."""

    metrics: dict[str, float]  # empty for a file without labels
    logits: npt.NDArray[np.float32]  # (rows, C), in the file's order
    positive_label: str | None = None  # that f1 is of

    @property
    def figures(self) -> dict[str, float | str]:
        """The metrics, and the label that f1 is of beside it."""
        named = {} if self.positive_label is None or not self.metrics else {POSITIVE: self.positive_label}
        return {**self.metrics, **named}


def evaluate_split(
    scorer: Scorer,
    split: Split,
    labels: Sequence[str] | None,
    *,
    positive_label: str | None = None,
    label: str = "",
) -> Evaluation:
    """Score every row of `split`, and measure where it has labels.

    `labels` in id order, None for regression; f1 is of `positive_label` (None: of id 1); `label` leads the
    progress bar. Raises StoppedError when the stop flag is set.
    """
    with Progress(len(split), "row", label=label, transient=True) as progress:
        logits = scorer.logits(split.tokens, progress.advance)
    if split.targets is None:
        return Evaluation({}, logits)
    return Evaluation(measure(logits, split.targets, labels, positive_label), logits, positive_label)


def measure(
    logits: npt.NDArray[np.float32],
    gold: Targets,
    labels: Sequence[str] | None,
    positive_label: str | None = None,
) -> dict[str, float]:
    """The metrics of logits (rows, C) against label ids, or against values where `labels` is None.

    `loss` is the plain mean cross-entropy (no class weights, no smoothing) or mean squared error.
    """
    wide = logits.astype(np.float64)
    if labels is None:
        values = wide[:, 0]
        return {"loss": float(np.mean((values - gold) ** 2)), **regression_metrics(gold, values)}
    shifted = wide - wide.max(axis=1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(gold)), gold]
    positive = 1 if positive_label is None else labels.index(positive_label)
    return {
        "loss": float(losses.mean()),
        **classification_metrics(gold, wide.argmax(axis=1), len(labels), positive),
    }


def result_files(evaluation: Evaluation, split: Split, labels: Sequence[str] | None) -> dict[str, bytes]:
    """The files of an evaluation, by name: predictions.tsv; with gold labels eval_results.txt and .json;
    for classes confusion_matrix.png."""
    files = {"predictions.tsv": _predictions(evaluation, split, labels)}
    if split.targets is None:
        return files
    files |= format_eval_results(evaluation.figures)
    if labels is not None:
        matrix = confusion_of(evaluation, split, labels)
        files["confusion_matrix.png"] = draw_confusion(matrix, labels)
    return files


def confusion_of(evaluation: Evaluation, split: Split, labels: Sequence[str]) -> npt.NDArray[np.int64]:
    """Counts (C, C): gold classes down, predicted ones across."""
    assert split.targets is not None
    return confusion_matrix(split.targets, evaluation.logits.argmax(axis=1), len(labels))


def _predictions(evaluation: Evaluation, split: Split, labels: Sequence[str] | None) -> bytes:
    predictions = make_predictions(evaluation.logits, split.tokens, labels)
    pairs = split.pairs
    return format_predictions(
        lines=pairs.line_of_row,
        files=[pairs.files[i] for i in pairs.file_of_row] if len(pairs.files) > 1 else None,
        predicted=[p.score if p.label is None else p.label for p in predictions],
        scores=[p.score for p in predictions],
        truncated=split.tokens.truncated,
        gold=pairs.labels,
        labels=labels or (),
        probabilities=[list(p.probabilities.values()) for p in predictions],
    )


def curves_file(records: Sequence[Mapping[str, Any]], metric: str) -> dict[str, bytes]:
    """curves.png of the records of metrics.jsonl; no file where there is nothing to draw."""
    return {"curves.png": draw_curves(records, metric)} if records else {}
