"""`cross_validate(config, 5)`: every training row is scored by a model that has not seen it.

The rows are cut into parts; each part is scored by a model trained on the others, with its last weights, as
nothing may be chosen by the part that it is measured on.
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bertpair.checkpoints.atomic import replace_file
from bertpair.checkpoints.lock import RunLock
from bertpair.console import interruptible, lines_shown, stop_flag
from bertpair.data.dataset import Split
from bertpair.data.tsv import read_pairs
from bertpair.errors import ConfigError, DataError, StoppedError
from bertpair.evaluation.report import ESCAPES
from bertpair.search.runs import Materials, RunsFolder, check_metric
from bertpair.search.seeds import Summary, summarise
from bertpair.settings.config import Config
from bertpair.settings.contradictions import check_config
from bertpair.training.setup import Material

RESULTS, PREDICTIONS, SUSPICIOUS = "folds_results.tsv", "fold_predictions.tsv", "suspicious_labels.tsv"
OURS = ("fold-*", RESULTS, PREDICTIONS, SUSPICIOUS)
# Nothing is chosen by the rows that a fold is measured on.
LAST_WEIGHTS = {"eval_strategy": "no", "load_best_model_at_end": False, "early_stopping_patience": None}
logger = logging.getLogger(__name__)


def cross_validate(
    config: Config,
    folds: int,
    *,
    group_column: str | int | None = None,
    keep_all_weights: bool = False,
) -> Summary:
    """Train once for each of `folds` parts of the training data, on the rest of it, and score the part.

    The parts have like shares of each label; rows with the same text in `group_column` are in one part. The
    dev file is not used. Results are in `config.output_dir`; what was interrupted goes on. Raises what
    `train` raises; StoppedError says how many folds are done.
    """
    for name in LAST_WEIGHTS if config.eval_strategy != "no" else ():
        if getattr(config, name) and name != "eval_strategy":
            logger.info("%s has no effect: a fold's model has its last weights", name)
    config = check_config(config.model_copy(update={**LAST_WEIGHTS, "dev_file": None}), training=True)
    with lines_shown(), interruptible():
        material = Materials().read(config.model_copy(update={"do_train": True, "do_eval": False}))
        metric = check_metric(config.metric_for_best_model, material)
        parts = split_rows(material, folds, config, group_column)
        about: dict[str, Any] = {"folds": folds, "group_column": group_column}
        path, keep = Path(str(config.output_dir)), keep_all_weights
        runs = RunsFolder(path, config, metric, keep_all_weights=keep, ours=OURS, **about)
        lock = RunLock(runs.path)
        lock.acquire()
        try:
            names = [f"fold-{number + 1}" for number in range(folds)]
            for number, name in enumerate(names):
                try:
                    stop_flag.raise_if_set()
                    own = material_of(material, parts, number)
                    figures = runs.run(name, config, own)
                except StoppedError as stopped:
                    done = f"{number} of {folds} folds are done; the same command goes on"
                    raise StoppedError(stopped.signum, done) from None
                logger.info("%s: %s %s (%d of %d)", name, metric, figures.metrics[metric], number + 1, folds)
            write_predictions(runs.path, material, parts)
            return summarise(runs, names, RESULTS)
        finally:
            lock.release()


def split_rows(
    material: Material, folds: int, config: Config, group_column: str | int | None
) -> npt.NDArray[np.int64]:
    """The number of each row's part, (rows,). ConfigError where there are more parts than rows or groups."""
    from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold

    train = material.train
    assert train.targets is not None
    groups = None if group_column is None else read_groups(material, config, group_column)
    found = len(train) if groups is None else len(set(groups))
    if found < folds:
        what = "rows" if groups is None else f"different values of group_column {group_column}"
        raise ConfigError(f"folds: found {found} {what} for {folds} folds")
    is_shuffled: dict[str, Any] = {"shuffle": True, "random_state": config.seed}
    if material.labels is None:
        splitter = (KFold if groups is None else GroupKFold)(folds, **is_shuffled)
    else:
        rarest = int(np.bincount(train.targets, minlength=len(material.labels)).min())
        if rarest < folds:
            logger.warning("a label has %d rows for %d folds: some folds have none of it", rarest, folds)
        splitter = (StratifiedKFold if groups is None else StratifiedGroupKFold)(folds, **is_shuffled)
    parts = np.empty(len(train), np.int64)
    with warnings.catch_warnings():  # of rare labels: said above
        warnings.simplefilter("ignore")
        for number, (_, held_out) in enumerate(splitter.split(parts, train.targets, groups)):
            parts[held_out] = number
    return parts


def read_groups(material: Material, config: Config, column: str | int) -> list[str]:
    """The text of each training row in a column, in the order of the rows."""
    source, pairs = material.source, material.train.pairs
    columns = dataclasses.replace(source.columns, text_a=column, text_b=None, label=None)
    read = read_pairs(source.train_files, columns, on_bad_row=config.on_bad_row)
    places = zip(read.file_of_row.tolist(), read.line_of_row.tolist(), strict=True)
    found = dict(zip(places, read.text_a, strict=True))
    groups = []
    for row, place in enumerate(zip(pairs.file_of_row.tolist(), pairs.line_of_row.tolist(), strict=True)):
        if place not in found:
            raise DataError(f"{pairs.where(row)}: group_column {column} is empty")
        groups.append(found[place])
    return groups


def material_of(material: Material, parts: npt.NDArray[np.int64], number: int) -> Material:
    """What the run of one part has: the other rows to train on, its own to be measured on."""
    train, dev = (material.train.take(np.flatnonzero(each)) for each in (parts != number, parts == number))
    return dataclasses.replace(material, train=train, dev=dev)


def write_predictions(path: Path, material: Material, parts: npt.NDArray[np.int64]) -> None:
    """The rows of all parts, as each fold's predictions.tsv has them, in the order of the training data; and
    for labels the rows by how unlikely their own label is to the model that has not seen them."""
    rows: list[str] = [""] * len(parts)
    head = ""
    for number in range(int(parts.max()) + 1):
        head, *lines = (path / f"fold-{number + 1}" / "predictions.tsv").read_text("utf-8").splitlines()
        for row, line in zip(np.flatnonzero(parts == number), lines, strict=True):
            rows[row] = f"{number + 1}\t{line}"
    replace_file(path / PREDICTIONS, "".join(f"{line}\n" for line in [f"fold\t{head}", *rows]).encode())
    if material.labels is not None:
        names = ["fold", *head.split("\t")]
        first = names.index(f"prob_{material.labels[0].translate(ESCAPES)}")
        cells = [row.split("\t") for row in rows]
        probabilities = np.array([row[first:] for row in cells], dtype=np.float64)
        replace_file(path / SUSPICIOUS, suspicious_labels(material.train, material.labels, probabilities))


def suspicious_labels(train: Split, labels: tuple[str, ...], probabilities: npt.NDArray[np.float64]) -> bytes:
    """The rows from the least likely own label to the likeliest: file, line, label, its probability, what the
    model would say and that label's probability, and the texts. `probabilities` is (rows, C)."""
    assert train.targets is not None
    pairs, gold = train.pairs, train.targets.astype(np.int64)
    own = probabilities[np.arange(len(gold)), gold]
    said = probabilities.argmax(axis=1)
    names = [label.translate(ESCAPES) for label in labels]
    texts = [pairs.text_a] if pairs.text_b is None else [pairs.text_a, pairs.text_b]
    head = ["file", "line", "label", "probability", "predicted", "predicted_probability"]
    lines = [[*head, *("text_a", "text_b")[: len(texts)]]]
    for row in np.argsort(own, kind="stable"):
        cells = [pairs.files[pairs.file_of_row[row]].translate(ESCAPES), str(pairs.line_of_row[row])]
        cells += [names[gold[row]], f"{own[row]:.6f}", names[said[row]], f"{probabilities[row].max():.6f}"]
        lines.append([*cells, *(text[row].translate(ESCAPES) for text in texts)])
    return "".join("\t".join(line) + "\n" for line in lines).encode()
