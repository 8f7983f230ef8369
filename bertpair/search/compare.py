"""Two ways of training, each with several seeds, on the same rows: is one better by more than luck?"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bertpair.checkpoints.checkpoint import COMPARED, RUNS_FILE, list_runs, write_results
from bertpair.errors import CheckpointError, ConfigError
from bertpair.evaluation.compare import COMPARISON
from bertpair.evaluation.figures import weighted_kappa
from bertpair.evaluation.metrics import classification_metrics, regression_metrics
from bertpair.evaluation.page import REPORT, Page, Section, Table, render
from bertpair.evaluation.report import ESCAPES, p_text, text_table
from bertpair.evaluation.significance import SeedComparison
from bertpair.evaluation.significance import compare_seeds as paired_test
from bertpair.search.report import spread
from bertpair.search.runs import mean_and_deviation
from bertpair.settings.config import Config
from bertpair.settings.files import read_json

SAID = (
    "The paired t test over seeds: the same seeds are compared with each other. Where the 95 % interval of "
    "the mean difference holds 0, it may be luck."
)


@dataclasses.dataclass(frozen=True)
class SeedsResult:
    """What comparing folders of several seeds gave."""

    comparisons: dict[str, dict[str, SeedComparison]]  # by the other folder, then by metric
    folders: dict[str, str]  # where the files of each are
    text: str

    def summary(self) -> dict[str, Any]:
        """The values of evaluate.py's last line."""
        return {name: _as_plain(each) for name, each in self.comparisons.items()}


@dataclasses.dataclass(frozen=True)
class _Seeds:
    """The figures of a folder's runs, from the predictions that they kept."""

    dev_data: str
    by_seed: dict[str, dict[str, float]]  # by the run's name, then by metric


def compare_seeds(config: Config) -> SeedsResult:
    """Compare the folder of several seeds in `config.model_dir` with each of `config.compare`.

    ConfigError where these were not measured on the same rows, or have fewer than two seeds in common;
    CheckpointError where a folder is none of several seeds or is damaged.
    """
    path = Path(str(config.model_dir))
    if not config.compare:
        advice = f"name the model of one, such as {list_runs(path)[0]}, or another such folder with --compare"
        raise ConfigError(f"model_dir: {path} holds several runs: {advice}")
    comparisons, folders, texts = {}, {}, []
    for other in config.compare:
        seeds, columns = _shared(path, Path(other), config.label_order)
        tests = {name: paired_test(*values) for name, values in columns.items()}
        head, rows = ["", str(path), other, "difference", "95 % interval", "p"], _rows(columns, tests)
        texts.append(f"{len(seeds)} seeds, {seeds[0]} to {seeds[-1]}\n{text_table(head, rows)}")
        files = {COMPARISON: json.dumps(_as_plain(tests), indent=1).encode() + b"\n"}
        if config.report:
            table = Table(["figure", *head[1:]], rows)
            sections = [Section("Comparison", [SAID, table]), _each_seed(columns, seeds)]
            title = f"{path.absolute().name} and {Path(other).absolute().name}"
            page = Page(title, f"{len(seeds)} seeds each, on the same dev rows", [], sections)
            files[REPORT] = render(page)
        folder = _output_folder(config, path, Path(other))
        write_results(folder, files)
        comparisons[other], folders[other] = tests, str(folder)
    return SeedsResult(comparisons, folders, "\n\n".join(texts))


def _shared(
    path: Path, other: Path, order: Sequence[str] | None
) -> tuple[list[str], dict[str, list[list[float]]]]:
    """The seeds that two folders have in common, and for each metric its values of these in either folder."""
    ours, theirs = (_read(each, order) for each in (path, other))
    if ours.dev_data != theirs.dev_data:
        raise ConfigError(f"compare: {other} was not measured on the same dev rows as {path}")
    seeds = [name for name in ours.by_seed if name in theirs.by_seed]
    if len(seeds) < 2:
        raise ConfigError(f"compare: {other} and {path} have {len(seeds)} seeds in common; 2 are needed")
    both = [[each.by_seed[name] for name in seeds] for each in (ours, theirs)]
    metrics = [name for name in both[0][0] if name in both[1][0]]
    return seeds, {name: [[figures[name] for figures in each] for each in both] for name in metrics}


def _read(path: Path, order: Sequence[str] | None) -> _Seeds:
    said = read_json(path / RUNS_FILE)
    if not said.get("dev_data"):
        why = "they are folds, or an earlier version finished them"
        raise CheckpointError(f"{path / RUNS_FILE} does not say on which rows its runs were measured: {why}")
    return _Seeds(said["dev_data"], {run.name: _measure(run, order) for run in list_runs(path)})


def _measure(run: Path, order: Sequence[str] | None) -> dict[str, float]:
    """The figures of a run, from its predictions.tsv; with the labels' order, if they have one, kappa too."""
    path = run / "predictions.tsv"
    try:
        head, *rows = (line.split("\t") for line in path.read_text("utf-8").removesuffix("\n").split("\n"))
        gold, found = ([row[head.index(name)] for row in rows] for name in ("gold", "predicted"))
        labels = [name.removeprefix("prob_") for name in head if name.startswith("prob_")]
        if not labels:
            figures = regression_metrics([*map(float, gold)], [*map(float, found)])
        else:
            known = read_json(run / "eval_results.json").get("positive_label", labels[1])
            positive = labels.index(known.translate(ESCAPES))
            ids, named = (np.array([labels.index(label) for label in column]) for column in (gold, found))
            figures = classification_metrics(ids, named, len(labels), positive)
            if order is not None and set(order) == set(labels):
                figures["qwk"] = weighted_kappa(ids, named, [order.index(label) for label in labels])
    except (OSError, ValueError, IndexError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    del figures["n"]
    return figures


def _rows(
    columns: Mapping[str, list[list[float]]], comparisons: Mapping[str, SeedComparison]
) -> list[list[Any]]:
    lines = []
    for name, values in columns.items():
        (value, low, high), p_value = comparisons[name]
        each = (spread(*mean_and_deviation(column)) for column in values)
        lines.append([name, *each, f"{value:+.4f}", f"{low:+.4f} to {high:+.4f}", p_text(p_value)])
    return lines


def _each_seed(columns: Mapping[str, list[list[float]]], seeds: Sequence[str]) -> Section:
    head = ["seed", *(f"{name}, {which}" for name in columns for which in ("this", "other"))]
    flat = [column for values in columns.values() for column in values]
    return Section(
        "Seeds", [Table(head, [[*row] for row in zip(seeds, *flat, strict=True)], is_sortable=True)]
    )


def _as_plain(comparisons: Mapping[str, SeedComparison]) -> dict[str, Any]:
    return {
        name: {**each.difference._asdict(), "p_value": each.p_value} for name, each in comparisons.items()
    }


def _output_folder(config: Config, path: Path, other: Path) -> Path:
    if config.eval_output_dir is not None:
        return Path(config.eval_output_dir)
    where = hashlib.sha256(os.fsencode(other.resolve())).hexdigest()[:8]
    return path / "eval" / f"{COMPARED}{other.resolve().name}-{where}"
