"""A temperature and a threshold that suit rows with labels, found and kept for later."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bertpair.errors import ConfigError, DataError
from bertpair.evaluation.calibration import Decision, Floats, Ids, Logits, calibration_bins, store
from bertpair.evaluation.measure import Scored, measure
from bertpair.evaluation.scorer import softmax
from bertpair.settings.config import Config


def check_fit(config: Config, labels: Sequence[str] | None) -> None:
    """ConfigError where the model's labels (None: a regression) do not allow what is to be found."""
    if (config.fit_temperature or config.fit_threshold) and labels is None:
        raise ConfigError("fit_temperature and fit_threshold are for labels; this model is a regression")
    if config.fit_threshold and labels is not None and len(labels) != 2:
        raise ConfigError(f"fit_threshold is for two labels; this model has {len(labels)}")


def fit(config: Config, scored: Scored, data: Sequence[Mapping[str, Any]]) -> list[str]:
    """Find what `fit_temperature` and `fit_threshold` ask for, and keep it; a line about each. `data` are the
    files of the rows. DataError where these rows do not tell."""
    labels, evaluation, gold = scored.labels, scored.evaluation, scored.split.targets
    assert labels is not None and gold is not None
    decision, lines = evaluation.decision, []
    if config.fit_temperature:
        temperature = fit_temperature(evaluation.logits, gold)
        fitted = dataclasses.replace(decision, temperature=temperature)
        (loss, error), (new_loss, new_error) = (_trust(scored, used) for used in (decision, fitted))
        place = store(scored.path, "temperature", data, {"temperature": temperature})
        lines.append(
            f"temperature {temperature:.4g}: on these rows, loss {loss:.4f} -> {new_loss:.4f}, calibration "
            f"error {error:.4f} -> {new_error:.4f}; kept in {place}; --temperature stored uses it"
        )
        decision = fitted
    if config.fit_threshold:
        positive = str(evaluation.positive_label)
        number = labels.index(positive)
        scores = softmax(decision.scale(evaluation.logits))[:, number]
        threshold, f1 = best_threshold(scores, gold == number)
        kept = {"threshold": threshold, "label": positive, "temperature": decision.temperature}
        place = store(scored.path, "threshold", data, kept)
        lines.append(
            f"threshold {threshold:.4g} for {positive}: f1 {f1:.4f} on these rows, which flatter it; kept in "
            f"{place}; --threshold stored uses it"
        )
    return lines


def _trust(scored: Scored, decision: Decision) -> tuple[float, float]:
    """The loss and the calibration error with this decision."""
    evaluation, gold = dataclasses.replace(scored.evaluation, decision=decision), scored.split.targets
    assert gold is not None
    loss = measure(evaluation.logits, gold, scored.labels, decision=decision)["loss"]
    return loss, calibration_bins(evaluation.probabilities, evaluation.chosen, gold).error


def fit_temperature(logits: Logits, gold: Ids) -> float:
    """The temperature with the least cross-entropy on these rows; DataError where there is none.

    The loss is convex in the inverse of the temperature, so its derivative is halved down to a zero.
    """
    wide = logits.astype(np.float64)
    own = wide[np.arange(len(gold)), gold]

    def slope(inverse: float) -> float:
        exponents = inverse * wide
        weights = np.exp(exponents - exponents.max(axis=1, keepdims=True))
        expected = (weights * wide).sum(axis=1) / weights.sum(axis=1)
        return float((expected - own).mean())

    if not np.isfinite(wide).all():
        raise DataError("fit_temperature: the model's answers are not finite numbers")
    low, high = 0.01, 100.0
    if slope(low) >= 0 or slope(high) <= 0:
        how = "no row of them is wrong" if slope(high) <= 0 else "the answers are no better than chance"
        raise DataError(f"fit_temperature: no temperature suits these rows: {how}")
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 1 / math.sqrt(low * high)


def best_threshold(scores: Floats, is_gold: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """The threshold on `scores` (rows,) with the best f1 of the rows that are `is_gold`, and that f1.

    It lies midway between two scores that occur; of equal ones it is the highest. DataError where no row is
    gold.
    """
    if not is_gold.any():
        raise DataError("fit_threshold: no row has the label that f1 is of")
    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order], np.cumsum(is_gold[order])
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))  # the last of each run of equal ones
    f1 = 2 * hits[last] / (last + 1 + hits[-1])
    best = int(f1.argmax())
    following = ranked[last[best] + 1] if last[best] + 1 < len(ranked) else 0.0
    return float((ranked[last[best]] + following) / 2), float(f1[best])
