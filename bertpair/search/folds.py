"""`cross_validate(config, 5)`: every training row is scored by a model that has not seen it.

The rows are cut into parts; each part is scored by a model trained on the others, with its last weights, as
nothing may be chosen by the part that it is measured on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bertpair.checkpoints.atomic import replace_file
from bertpair.console import interruptible, lines_shown
from bertpair.data.dataset import Pairs
from bertpair.errors import ConfigError, listed
from bertpair.evaluation.report import ESCAPES, tsv
from bertpair.search.runs import Materials, RunsFolder, chosen_metric
from bertpair.search.seeds import Summary, summarise
from bertpair.settings.config import Config
from bertpair.settings.contradictions import check_config
from bertpair.training.setup import Material, class_weight_tensor, digest_of

RESULTS, PREDICTIONS, SUSPICIOUS = "folds_results.tsv", "fold_predictions.tsv", "suspicious_labels.tsv"
OURS = ("fold-*", RESULTS, PREDICTIONS, SUSPICIOUS)
CHOOSING = {"load_best_model_at_end": False, "early_stopping_patience": None}
LAST_WEIGHTS = {**CHOOSING, "eval_strategy": "no", "evaluate_during_training": False, "dev_file": None}
logger = logging.getLogger(__name__)


def cross_validate(
    config: Config,
    folds: int,
    *,
    group_column: str | int | None = None,
    keep_all_weights: bool = False,
) -> Summary:
    """Train once for each of `folds` parts of the training data, on the rest of it, and score the part.

    The parts have like shares of each label; rows with the same text in `group_column` (by default that of
    `config`) are in one part. The dev file is not used, and no weights stay. Results are in
    `config.output_dir`; what was interrupted goes on. Raises what `train` raises; StoppedError says how many
    runs are done.
    """
    with lines_shown(), interruptible():
        for name in CHOOSING:
            if getattr(config, name):
                logger.warning("%s has no effect: a fold's model has its last weights", name)
        grouped = {} if group_column is None else {"group_column": group_column}
        config = check_config(config.model_copy(update=LAST_WEIGHTS | grouped), training=True)
        material = Materials().read(config.model_copy(update={"do_train": True, "do_eval": False}))
        metric = chosen_metric(config.metric_for_best_model, material)
        parts = split_rows(material, folds, config.seed)
        for number in range(folds) if config.class_weights else ():  # each training needs all labels
            own = material_of(material, parts, number)
            class_weight_tensor(config.class_weights, material.labels, own.train)
        digest = hashlib.sha256(digest_of(material.train).encode() + parts.tobytes()).hexdigest()[:12]
        about: dict[str, Any] = {"folds": folds, "group_column": config.group_column, "training_data": digest}
        path, keep = Path(str(config.output_dir)), "all" if keep_all_weights else "none"
        names = {f"fold-{number + 1}": number for number in range(folds)}
        with RunsFolder.locked(path, config, metric, keep=keep, ours=OURS, **about) as runs:
            runs.run_all(dict.fromkeys(names, config), lambda name: material_of(material, parts, names[name]))
            write_predictions(runs.path, material, parts)
            return dataclasses.replace(summarise(runs, list(names), RESULTS), best_model=None)


def split_rows(material: Material, folds: int, seed: int) -> npt.NDArray[np.int64]:
    """The number of each row's part, (rows,). ConfigError where rows, groups or labels are too few."""
    from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold

    train, labels = material.train, material.labels
    assert train.targets is not None
    groups = train.pairs.groups
    found = len(train) if groups is None else len(set(groups))
    if not 2 <= folds <= found:
        what = (
            "rows"
            if groups is None
            else f"different values of group_column {material.source.settings.group_column}"
        )
        raise ConfigError(f"folds: found {folds}; at least 2, and at most the {found} {what}")
    if labels is None:
        kind = KFold if groups is None else GroupKFold
    else:
        kind = StratifiedKFold if groups is None else StratifiedGroupKFold
        if (most := np.bincount(train.targets).max()) < folds:
            raise ConfigError(f"folds: found {folds}; no label has more than {most} rows")
    parts = np.empty(len(train), np.int64)
    with warnings.catch_warnings():  # of rare labels: said below
        warnings.simplefilter("ignore")
        splitter = kind(folds, shuffle=True, random_state=seed)
        for number, (_, held_out) in enumerate(splitter.split(parts, train.targets, groups)):
            parts[held_out] = number
    if labels is not None:
        has = np.unique(train.targets * folds + parts)  # one for each label that a part has
        num_parts = np.bincount(has // folds, minlength=len(labels))
        if few := [label for label, number in zip(labels, num_parts, strict=True) if number < folds]:
            logger.warning("too few rows, or groups, for each fold to have some: %s", listed(few))
    return parts


def material_of(material: Material, parts: npt.NDArray[np.int64], number: int) -> Material:
    """What the run of one part has: the other rows to train on, its own to be measured on."""
    train, dev = (material.train.take(np.flatnonzero(each)) for each in (parts != number, parts == number))
    return dataclasses.replace(material, train=train, dev=dev)


def write_predictions(path: Path, material: Material, parts: npt.NDArray[np.int64]) -> None:
    """The rows of all parts, as each fold's predictions.tsv has them, in the order of the training data; and
    for labels the rows by how unlikely their own label is to the model that has not seen them."""
    rows: list[list[str]] = [[]] * len(parts)
    head: list[str] = []
    for number in range(int(parts.max()) + 1):
        text = (path / f"fold-{number + 1}" / "predictions.tsv").read_bytes().decode()
        head, *lines = (line.split("\t") for line in text.removesuffix("\n").split("\n"))
        for row, cells in zip(np.flatnonzero(parts == number), lines, strict=True):
            rows[row] = [str(number + 1), *cells]
    head = ["fold", *head]
    tables = {PREDICTIONS: [head, *rows]}
    if material.labels is not None:
        tables[SUSPICIOUS] = suspicious_labels(material.train.pairs, head, rows)
    for name, table in tables.items():
        replace_file(path / name, tsv(table))


def suspicious_labels(pairs: Pairs, head: list[str], rows: list[list[str]]) -> list[list[str]]:
    """The rows from the least likely own label to the likeliest: file, line, label, its probability, what the
    model would say and that label's probability, and the texts; below a line of their names.

    `rows` are predictions, as text under the names in `head`: rows of equal probability, to their six digits,
    stay in the order of the data.
    """
    place = {name: number for number, name in enumerate(head)}
    gold, said, score = (place[name] for name in ("gold", "predicted", "score"))
    own = [row[place[f"prob_{row[gold]}"]] for row in rows]
    texts = [pairs.text_a] if pairs.text_b is None else [pairs.text_a, pairs.text_b]
    names = ["file", "line", "label", "probability", "predicted", "predicted_probability"]
    lines = [[*names, *("text_a", "text_b")[: len(texts)]]]
    for k in sorted(range(len(rows)), key=lambda k: (float(own[k]), -float(rows[k][score]))):
        where = pairs.files[pairs.file_of_row[k]].translate(ESCAPES), str(pairs.line_of_row[k])
        found = rows[k][gold], own[k], rows[k][said], rows[k][score]
        lines.append([*where, *found, *(text[k].translate(ESCAPES) for text in texts)])
    return lines
