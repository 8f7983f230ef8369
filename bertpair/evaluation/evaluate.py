"""From model folders and a data set to metrics, tables and files: what `python evaluate.py` runs."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bertpair.checkpoints.checkpoint import (
    INPUT_FILE,
    discard_parts,
    file_digest,
    is_model_folder,
    settings_folder,
    write_results,
)
from bertpair.checkpoints.run_folder import versions
from bertpair.console import check_alone, program
from bertpair.data.columns import Columns, has_column, said
from bertpair.data.dataset import Pairs, make_split, report_labels
from bertpair.data.lines import has_stdin
from bertpair.data.source import Source, resolve_source
from bertpair.errors import ConfigError, DataError, first_line
from bertpair.evaluation.candidates import (
    Candidate,
    check_comparable,
    describe,
    list_candidates,
    model_digest,
    open_candidate,
    results_folder,
)
from bertpair.evaluation.classifier import PairClassifier
from bertpair.evaluation.compare import COMPARISON, as_json, compare_models
from bertpair.evaluation.fit import check_fit, fit
from bertpair.evaluation.html_report import evaluation_page
from bertpair.evaluation.measure import Scored, collapse, detail, evaluate_split, result_files, with_further
from bertpair.evaluation.metrics import finite_or_null
from bertpair.evaluation.page import REPORT, render
from bertpair.evaluation.report import (
    class_table,
    comparison_table,
    confusion_table,
    figure_lines,
    group_table,
    significance_table,
)
from bertpair.evaluation.rows import WINDOW_ROWS
from bertpair.evaluation.significance import Comparison
from bertpair.evaluation.stream import Output, Writing, label_windows
from bertpair.model.pretrained import resolve_folder
from bertpair.processes import Processes, joined
from bertpair.runtime import set_deterministic, set_threads
from bertpair.settings.config import Config, DeviceSettings
from bertpair.settings.contradictions import check_config
from bertpair.settings.data import DataSettings
from bertpair.settings.evaluate import EvaluateSettings
from bertpair.settings.stored import as_flags, model_settings

logger = logging.getLogger(__name__)

LAYOUT = {"has_header", "text_a_column", "text_b_column", "label_column"}


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """What evaluating one or several models on one data set gave."""

    metrics: dict[str, float | str]  # of the model that was asked for; empty for a file without labels
    by_model: dict[str, dict[str, float | str]]  # every model evaluated, in the table's order
    folders: dict[str, str]  # where each one's files are
    num_rows: int
    text: str  # the tables
    comparisons: dict[str, Comparison] = dataclasses.field(default_factory=dict)  # with each of `compare`

    def summary(self) -> dict[str, float | str | None]:
        """The values of evaluate.py's last line."""
        return finite_or_null({"n": self.num_rows, **self.metrics})


def evaluate(
    model_dir: str | Path, data_file: str | Path | None = None, *, output_dir: str | Path | None = None
) -> EvaluationResult:
    """Evaluate the model in `model_dir` on `data_file` (default: the dev file it was trained with).

    Columns and labels are those of the model's training; the files go to `output_dir`, by default
    `eval/<data file>-<digest>/` in the model folder (for a checkpoint, in the folder above it). Raises
    ConfigError, DataError or CheckpointError.
    """
    values = model_settings(settings_folder(Path(model_dir).expanduser()))
    values |= {"model_dir": model_dir, "data_file": data_file, "eval_output_dir": output_dir}
    return evaluate_models(Config(**values))


@dataclasses.dataclass(frozen=True)
class _Rows:
    """What is evaluated: the rows, and how they are measured."""

    source: Source
    pairs: Pairs
    data: list[dict[str, Any]]  # path, sha256 and rows of each file
    positive_label: str | None
    known_groups: frozenset[str] | None


def evaluate_models(config: Config, *, explicit: Collection[str] = ()) -> EvaluationResult:
    """Evaluate as `config` says: one model, all checkpoints of a folder, others beside it, or predict.

    `explicit` names the settings that were given rather than taken from the model folder.
    """
    config = check_config(config)
    set_threads(config.num_threads)
    set_deterministic(config.deterministic)
    if config.model_dir is None:
        raise ConfigError("model_dir: not set; name a trained folder (or output_dir in config.yaml)")
    model_dir = resolve_folder(config.model_dir, revision=config.revision, cache_dir=config.cache_dir)
    candidates = list_candidates(config, model_dir)  # a wrong model folder is said before a wrong data file
    if config.eval_output_dir is not None:
        for place in ("", *(candidate.prefix for candidate in candidates)):
            if is_model_folder(folder := Path(config.eval_output_dir, place)):
                raise ConfigError(f"output_dir: {folder} is a model folder; name another one for the results")
    if not config.predict:
        check_alone("an evaluation with figures")
    first = open_candidate(candidates[0], config, explicit)
    check_fit(config, first.labels)
    if config.predict:
        with joined(config.ddp_timeout) as processes:
            return _predict(config, explicit, model_dir, candidates, first, processes)
    rows = _read_rows(config, first, explicit)
    if config.eval_output_dir is not None:
        discard_parts(Path(config.eval_output_dir))
    found: list[Scored] = []
    for candidate in candidates:
        model = first if candidate is candidates[0] else open_candidate(candidate, config, explicit)
        check_comparable(candidate, model, first)
        found.append(_score(candidate, model, rows, config, model_dir))
    number = len(found) - 1 - len(config.compare or ())
    return _conclude(config, explicit, rows, found[: number + 1], found[number + 1 :])


def _conclude(
    config: Config, explicit: Collection[str], rows: _Rows, own: Sequence[Scored], others: Sequence[Scored]
) -> EvaluationResult:
    """What follows once all models are scored: tables, comparisons, the report, a fit. The last of `own` is
    the model that was asked for, the others are what it is compared with."""
    found, asked = [*own, *others], own[-1]
    watched = config.metric_for_best_model or rows.source.metrics[0]
    by_model = {each.name: each.details.figures if each.details else {} for each in found}
    texts = [_tables(asked) if len(found) == 1 else comparison_table(by_model, watched)]
    comparisons = {each.name: compare_models(asked, each) for each in others}
    if comparisons:
        texts.append(f"{asked.name} on the same rows\n{significance_table(comparisons)}")
        write_results(asked.folder, {COMPARISON: as_json(comparisons)}, adds=True)
    if config.report:
        names = {*explicit} | {
            name for name in EvaluateSettings.model_fields if name in config.model_fields_set
        }
        command = f"{program('evaluate')} {shlex.join(as_flags(config, sorted(names)))}"
        page = evaluation_page(asked, by_model if len(found) > 1 else {}, others, comparisons, command)
        write_results(asked.folder, {REPORT: render(page)}, adds=True)
    if config.fit_temperature or config.fit_threshold:
        texts += fit(config, asked, rows.data)
    folders = {each.name: str(each.folder) for each in found}
    text = "\n\n".join(texts)
    return EvaluationResult(by_model[asked.name], by_model, folders, len(rows.pairs), text, comparisons)


def _predict(
    config: Config,
    explicit: Collection[str],
    model_dir: Path,
    candidates: Sequence[Candidate],
    first: PairClassifier,
    processes: Processes,
) -> EvaluationResult:
    """Label rows that have no labels with each model, window by window."""
    config = config.model_copy(update={"group_column": None})  # nothing is measured
    source, files, columns = _find_rows(config, first, explicit)
    from_stdin = has_stdin(files)
    if from_stdin and processes.size > 1:
        raise ConfigError("data_file -: several processes cannot share the standard input; give a file")
    num_rows = None
    if not from_stdin:
        num_rows = processes.all_or_none(lambda: source.count(files, columns, first.labels))
    data = [{"path": os.path.realpath(name), "sha256": file_digest(name)} for name in files if not from_stdin]
    processes.check_same("data_file", json.dumps([each["sha256"] for each in data]))
    if config.eval_output_dir is not None and processes.is_first:
        discard_parts(Path(config.eval_output_dir))
    writing = Writing(config.predictions_format == "jsonl", config.with_texts, len(files) > 1)
    folders = {}
    for candidate in candidates:
        model = first if candidate is candidates[0] else open_candidate(candidate, config, explicit)
        check_comparable(candidate, model, first)
        folder = folders[candidate.name] = results_folder(config, model_dir, candidate, data)
        identity = None if from_stdin else _identity(config, candidate, model, data)
        output = Output(folder, identity)
        windows = source.windows(files, columns, model.labels, WINDOW_ROWS)
        found = label_windows(model, windows, num_rows, output, writing, processes, candidate.name)
        if processes.is_first:
            output.finish(writing.file_name, describe(candidate, model, data, predict=True))
    names = {name: str(folder) for name, folder in folders.items()}
    return EvaluationResult({}, {name: {} for name in names}, names, found, f"{found} rows predicted")


def _identity(
    config: Config, candidate: Candidate, model: PairClassifier, data: list[dict[str, Any]]
) -> dict[str, Any]:
    """Whatever decides what the predictions are: an earlier run with the same can be gone on with."""
    device, several = {"num_threads", "ddp_timeout"}, {"data_file", "compare", "all_checkpoints"}
    names = {*DataSettings.model_fields, *DeviceSettings.model_fields, *EvaluateSettings.model_fields}
    settings = {
        name: getattr(config, name) for name in sorted(names - device - several - {"eval_output_dir"})
    }
    made = {"decision": model.decision.figures, "cut": model.max_seq_length, "labels": model.labels}
    made |= {"batch_tokens": model.scorer.max_batch_tokens, "with_texts": config.with_texts}
    found = {
        "data_file": [each["sha256"] for each in data],
        "model": model_digest(candidate, model),
        "settings": {**settings, **made, "window_rows": WINDOW_ROWS},
        "version": versions(),
    }
    return dict(json.loads(json.dumps(found)))


def _find_rows(
    config: Config, first: PairClassifier, explicit: Collection[str]
) -> tuple[Source, tuple[Path, ...], Columns]:
    """The files to score, and how the first model reads them."""
    if config.data_file and "file_format" not in explicit:  # the training's was of its own files
        config = config.model_copy(update={"file_format": "auto"})
    source, files = _resolve_files(config)
    _check_task(config, first, source)
    columns = source.columns_for(
        files[0],
        with_labels=not config.predict,
        header=first.header,
        checks_header=not LAYOUT & set(explicit),  # what is given now is not held against the training file
        kept=config.keep_columns or (),
    )
    return source, files, columns


def _read_rows(config: Config, first: PairClassifier, explicit: Collection[str]) -> _Rows:
    """Read the data to score, as the first model reads it."""
    source, files, columns = _find_rows(config, first, explicit)
    group = config.group_column
    if group is not None and "group_column" not in explicit and not has_column(files, columns, group):
        logger.info("no figures of groups: %s does not have group_column %s", files[0], group)
        source = dataclasses.replace(source, settings=config.model_copy(update={"group_column": None}))
    pairs = source.read(files, columns, first.labels)
    if len(set(pairs.labels or ())) == 1:
        report_labels(", ".join(pairs.files), pairs, first.labels)
    counts = np.bincount(pairs.file_of_row, minlength=len(pairs.files)).tolist()
    data = [
        {"path": os.path.realpath(name), "sha256": file_digest(name), "rows": count}
        for name, count in zip(pairs.files, counts, strict=True)
    ]
    positive = source.positive_label(first.labels, config.positive_label)
    known = None if pairs.groups is None else _training_groups(config)
    return _Rows(source, pairs, data, positive, known)


def _training_groups(config: Config) -> frozenset[str] | None:
    """The groups in the training files; None where these cannot be read any more."""
    assert config.group_column is not None
    try:
        whole = {"on_bad_row": "skip", "max_train_samples": None, "dev_file": None}
        source = resolve_source(config.model_copy(update=whole), evaluates=False)
        return frozenset(source.read(source.train_files, source.columns, None).groups or ())
    except (DataError, ConfigError) as error:
        logger.info("groups of the training data are not known: %s", first_line(error))
        return None


def _resolve_files(config: Config) -> tuple[Source, tuple[Path, ...]]:
    """The data to score: data_file, else the dev file, or with `predict` the test file."""
    kind = "test" if config.predict and not config.data_file else "dev"
    named = config.model_copy(update={"dev_file": config.data_file}) if config.data_file else config
    source = resolve_source(named, needs=(kind,))
    for note in source.notes:
        logger.info("%s", note)
    return source, source.test_files if kind == "test" else source.dev_files


def _check_task(config: Config, model: PairClassifier, source: Source) -> None:
    """ConfigError where the settings ask for another kind of task or other labels than the model has."""
    kind = "regression" if model.labels is None else "classification"
    if source.regression != (model.labels is None):
        raise ConfigError(f"problem_type: {config.model_dir} is a {kind} model")
    if model.takes_pairs is not None and model.takes_pairs != (source.columns.text_b is not None):
        wanted = "pairs: name the column" if model.takes_pairs else "single texts: only null is allowed"
        raise ConfigError(
            f"text_b_column: found {said(source.columns.text_b) or None}; {config.model_dir} takes {wanted}"
        )
    if config.predict or model.labels is None or source.labels is None:
        return
    if set(source.labels) != set(model.labels):
        found, own = ", ".join(source.labels), ", ".join(model.labels)
        raise ConfigError(f"labels: found {found}; {config.model_dir} was trained for {own}")


def _score(
    candidate: Candidate, model: PairClassifier, rows: _Rows, config: Config, model_dir: Path
) -> Scored:
    """Score the rows with one model, and write its files."""
    split = make_split(rows.pairs, model.labels, model.tokenizer, model.max_seq_length, name=candidate.name)
    evaluation = evaluate_split(
        model.scorer,
        split,
        model.labels,
        positive_label=rows.positive_label,
        label_ranks=rows.source.label_ranks(model.labels),
        decision=model.decision,
        label=candidate.name,
    )
    details = None
    if split.targets is not None:
        details = detail(evaluation, split, model.labels, rows.known_groups)
        if config.all_figures or config.report:
            details = with_further(details, evaluation, split, model.labels)
    if (line := collapse(evaluation, split, model.labels)) is not None:
        logger.warning("%s: %s: the model cannot tell them apart", candidate.name, line)
    folder = results_folder(config, model_dir, candidate, rows.data)
    said = describe(candidate, model, rows.data, predict=False)
    described = json.dumps(said, indent=2, ensure_ascii=False) + "\n"
    files = result_files(evaluation, split, model.labels, details, with_texts=config.with_texts)
    write_results(folder, {**files, INPUT_FILE: described.encode(errors="surrogateescape")})
    return Scored(candidate.name, candidate.path, folder, model.labels, evaluation, details, split)


def _tables(scored: Scored) -> str:
    """The tables for one model."""
    details, labels = scored.details, scored.labels
    assert details is not None
    parts = []
    if labels is not None and details.classes is not None and details.confusion_matrix is not None:
        parts = [class_table(details.classes), confusion_table(labels, details.confusion_matrix)]
    if details.groups is not None:
        parts.append(group_table(details.groups))
    return "\n\n".join([*parts, figure_lines(details.figures)])
