"""Two models on the same rows: what each got right that the other did not, and whether it is luck."""

import json
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from bertpair.evaluation.measure import Scored
from bertpair.evaluation.significance import Comparison, compare_labels, compare_values

COMPARISON = "comparison.json"


def compare_models(asked: Scored, other: Scored) -> Comparison:
    """The model that was asked for against another one, on the labels of their rows."""
    gold, labels = asked.split.targets, asked.labels
    assert gold is not None
    answers = asked.answers(labels), other.answers(labels)
    return compare_values(gold, *answers) if labels is None else compare_labels(gold, *answers, len(labels))


def changed_rows(asked: Scored, other: Scored) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The rows that only `asked` has right, and those that only `other` has; labels alone are right or
    wrong."""
    gold, labels = asked.split.targets, asked.labels
    assert gold is not None and labels is not None
    ours, theirs = asked.answers(labels) == gold, other.answers(labels) == gold
    return np.flatnonzero(ours & ~theirs), np.flatnonzero(theirs & ~ours)


def as_json(comparisons: Mapping[str, Comparison]) -> bytes:
    """comparison.json: each comparison by the other model's name."""
    said = {
        name: each._asdict() | {"differences": {key: d._asdict() for key, d in each.differences.items()}}
        for name, each in comparisons.items()
    }
    return f"{json.dumps(said, ensure_ascii=False, indent=1)}\n".encode(errors="surrogateescape")
