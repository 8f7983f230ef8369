"""From logits to probabilities and a label, perhaps with a temperature and a threshold; how far the
probabilities can be trusted.

A temperature divides the logits, which changes the probabilities and never which is the highest (Guo et al.
2017, "On Calibration of Modern Neural Networks"). Both are kept in the model's derived/, and used only where
they are asked for. `fit.py` finds them.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bertpair.checkpoints.checkpoint import weights_digest
from bertpair.checkpoints.derived import derive, find_part
from bertpair.errors import CheckpointError, ConfigError
from bertpair.evaluation.metrics import finite_or_null
from bertpair.evaluation.scorer import softmax
from bertpair.settings.engine import EngineSettings

logger = logging.getLogger(__name__)

NUM_BINS = 15
Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[Any]
Logits = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Decision:
    """From logits to probabilities and a label; by default as in training."""

    temperature: float | None = None
    threshold: float | None = None  # with two labels: from this probability of `positive` on it is that
    positive: int = 1
    notes: tuple[str, ...] = ()  # where the two are from

    def scale(self, logits: Logits) -> Logits:
        """The logits that the probabilities are the softmax of."""
        return logits if self.temperature is None else (logits / np.float32(self.temperature))

    def choose(self, logits: Logits) -> Ids:
        """The id of each row's label, (rows,), from scaled logits (rows, C)."""
        if self.threshold is None:
            return np.asarray(logits.argmax(axis=1))
        is_positive = softmax(logits)[:, self.positive] >= self.threshold
        return np.where(is_positive, self.positive, 1 - self.positive)

    @property
    def figures(self) -> dict[str, float]:
        """What is not as in training, by the names of the settings."""
        given = {"temperature": self.temperature, "threshold": self.threshold}
        return {name: value for name, value in given.items() if value is not None}


AS_TRAINED = Decision()


def read_decision(
    folder: Path, labels: Sequence[str] | None, settings: EngineSettings, positive_label: str | None
) -> Decision:
    """What the settings `temperature` and `threshold` ask for, read from derived/ where they say `stored`.

    Says in the log what is used. ConfigError where they do not fit the model, CheckpointError where nothing
    is stored for these weights.
    """
    temperature, threshold = settings.temperature, settings.threshold
    if temperature is None and threshold is None:
        return AS_TRAINED
    if labels is None:
        raise ConfigError("temperature and threshold are for labels; this model is a regression")
    found: float | None = None
    notes = []
    stored: Mapping[str, Any]
    if temperature is not None:
        stored = _read(folder, "temperature") if temperature == "stored" else {"temperature": temperature}
        found = stored["temperature"]
        notes.append(f"temperature {found:.4g}, {_origin(stored)}")
    least: float | None = None
    positive = 1
    if threshold is not None:
        if len(labels) != 2:
            raise ConfigError(f"threshold is for two labels; this model has {len(labels)}")
        stored = {"threshold": threshold, "label": positive_label or labels[1], "temperature": found}
        if threshold == "stored":
            stored = _read(folder, "threshold")
        if stored["label"] not in labels:
            raise ConfigError(f"threshold: it is for {stored['label']!r}, which is no label of this model")
        least = at_temperature(stored["threshold"], stored["temperature"] or 1.0, found or 1.0)
        positive = list(labels).index(stored["label"])
        notes.append(f"threshold {least:.4g} for {stored['label']}, {_origin(stored)}")
    for note in notes:
        logger.info("%s", note)
    return Decision(found, least, positive, tuple(notes))


def _origin(stored: Mapping[str, Any]) -> str:
    return f"found on {stored['on']}" if "on" in stored else "as set"


def _read(folder: Path, name: str) -> Mapping[str, Any]:
    try:
        return find_part(folder, name, {"weights": weights_digest(folder)}).meta
    except CheckpointError as error:
        advice = f"evaluate.py --fit_{name} finds one"
        raise CheckpointError(
            f"no {name} is stored for the weights in {folder} ({error}); {advice}"
        ) from error


def store(folder: Path, name: str, data: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> Path:
    """Keep a temperature or a threshold in derived/, with what it was found on; where it lies."""
    rows = sum(file["rows"] for file in data)
    on = f"{' '.join(Path(file['path']).name for file in data)} ({rows:,} rows)"
    made_of = {"weights": weights_digest(folder), "data": [file["sha256"] for file in data], **found}
    path, _ = derive(folder, name, made_of, lambda staging: {"on": on})
    return path


def at_temperature(threshold: float, found_at: float, used_at: float) -> float:
    """The threshold that decides alike when the logits are divided by another number."""
    if found_at == used_at or not 0 < threshold < 1:
        return threshold
    return 1 / (1 + math.exp(-math.log(threshold / (1 - threshold)) * found_at / used_at))


class Bins(NamedTuple):
    """Rows by the probability of the label that was chosen: NUM_BINS equal parts from 0 to 1."""

    confidence: Floats  # its mean in each part; NaN in an empty one
    accuracy: Floats
    rows: Ids

    @property
    def error(self) -> float:
        """The expected calibration error: the mean distance of confidence and accuracy, by rows."""
        gaps = np.abs(self.confidence - self.accuracy)[self.rows > 0]
        return float(gaps @ self.rows[self.rows > 0] / self.rows.sum())

    def as_dicts(self) -> list[dict[str, Any]]:
        """A dict for each part, with null for NaN."""
        columns = zip(*(each.tolist() for each in self), strict=True)
        return [finite_or_null(dict(zip(self._fields, values, strict=True))) for values in columns]


def calibration_bins(probabilities: Floats, chosen: Ids, gold: Ids) -> Bins:
    """How often a label was right, beside its probability; from (rows, C) and twice (rows,) ids. NaN where
    a probability is."""
    confidence = probabilities[np.arange(len(chosen)), chosen]
    place = np.minimum((np.nan_to_num(confidence) * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    rows = np.bincount(place, minlength=NUM_BINS)
    sure, right = (np.bincount(place, each, NUM_BINS) for each in (confidence, 1.0 * (chosen == gold)))
    with np.errstate(invalid="ignore"):
        return Bins(sure / rows, right / rows, rows)
