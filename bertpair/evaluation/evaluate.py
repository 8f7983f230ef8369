"""From model folders and a data set to metrics, tables and files: what `python evaluate.py` runs.

`evaluate_split` measures one live model, in training too; `evaluate_models` opens folders and writes results.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bertpair.checkpoints.checkpoint import (
    COMPARED,
    INPUT_FILE,
    discard_parts,
    file_digest,
    final_folder,
    is_model_folder,
    list_checkpoints,
    open_model,
    output_dir_of,
    run_of,
    settings_folder,
    write_results,
)
from bertpair.console import Progress
from bertpair.data.dataset import Pairs, Split, Targets, make_split, report_labels
from bertpair.data.source import Source, resolve_source
from bertpair.errors import CheckpointError, ConfigError
from bertpair.evaluation.classifier import PairClassifier, make_predictions
from bertpair.evaluation.metrics import (
    Ids,
    classification_metrics,
    confusion_matrix,
    finite_or_null,
    per_class,
    regression_metrics,
)
from bertpair.evaluation.openvino import OpenVINOScorer
from bertpair.evaluation.plots import draw_confusion
from bertpair.evaluation.report import (
    class_table,
    comparison_table,
    confusion_table,
    format_eval_results,
    format_predictions,
)
from bertpair.evaluation.scorer import Scorer
from bertpair.model.config import check_model_type, read_folder
from bertpair.model.pretrained import resolve_folder
from bertpair.runtime import allowed_precisions, resolve_device, set_deterministic, set_threads
from bertpair.settings.config import Config
from bertpair.settings.contradictions import check_config
from bertpair.settings.stored import model_settings

logger = logging.getLogger(__name__)

LAYOUT = {"has_header", "text_a_column", "text_b_column", "label_column"}
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
    scorer: Scorer | OpenVINOScorer,
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
    figures = classification_metrics(gold, wide.argmax(axis=1), len(labels), positive)
    return {"loss": float(losses.mean()), **figures}


def result_files(evaluation: Evaluation, split: Split, labels: Sequence[str] | None) -> dict[str, bytes]:
    """The files of an evaluation, by name: predictions.tsv; with gold labels eval_results.txt and .json;
    for classes confusion_matrix.png."""
    predictions = make_predictions(evaluation.logits, split.tokens, labels)
    pairs = split.pairs
    names = [pairs.files[i] for i in pairs.file_of_row] if len(pairs.files) > 1 else None
    table = format_predictions(predictions, pairs.line_of_row, files=names, gold=pairs.labels, labels=labels)
    files = {"predictions.tsv": table}
    if split.targets is not None:
        files |= format_eval_results(evaluation.figures)
        if labels is not None:
            files["confusion_matrix.png"] = draw_confusion(_confusion(evaluation, split, labels), labels)
    return files


def class_figures(evaluation: Evaluation, split: Split, labels: Sequence[str]) -> str:
    """Precision, recall and F1 of every class as a table; `split` has gold labels."""
    return class_table(labels, per_class(_confusion(evaluation, split, labels)))


def _confusion(evaluation: Evaluation, split: Split, labels: Sequence[str]) -> Ids:
    assert split.targets is not None
    return confusion_matrix(split.targets, evaluation.logits.argmax(axis=1), len(labels))


# Model folders


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """What evaluating one or several models on one data set gave."""

    metrics: dict[str, float | str]  # of the model that was asked for; empty for a file without labels
    by_model: dict[str, dict[str, float | str]]  # every model evaluated, in the table's order
    folders: dict[str, str]  # where each one's files are
    num_rows: int
    text: str  # the tables

    def summary(self) -> dict[str, float | str | None]:
        """The values of evaluate.py's last line."""
        return finite_or_null({"n": self.num_rows, **self.metrics})


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """A model folder to evaluate, its name in the table, and what its results' folder is called after.

    `prefix` is empty for the model that was asked for; `is_own`: that one or a checkpoint of it.
    """

    name: str
    path: Path
    prefix: str = ""
    is_own: bool = True


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
    candidates = _candidates(config, model_dir)  # a wrong model folder is said before a wrong data file
    if config.eval_output_dir is not None:
        for place in ("", *(candidate.prefix for candidate in candidates)):
            if is_model_folder(folder := Path(config.eval_output_dir, place)):
                raise ConfigError(f"output_dir: {folder} is a model folder; name another one for the results")
    first = _open(candidates[0], config, explicit)
    source, files = _resolve_files(config)
    _check_task(config, first, source)
    columns = source.columns_for(
        files[0],
        with_labels=not config.predict,
        header=first.header,
        checks_header=not LAYOUT & set(explicit),  # what is given now is not held against the training file
    )
    pairs = source.read(files, columns, first.labels)
    positive = source.positive_label(first.labels, config.positive_label)
    if len(set(pairs.labels or ())) == 1:
        report_labels(", ".join(pairs.files), pairs, first.labels)
    rows = np.bincount(pairs.file_of_row, minlength=len(pairs.files)).tolist()
    data = [
        {"path": os.path.realpath(name), "sha256": file_digest(name), "rows": count}
        for name, count in zip(pairs.files, rows, strict=True)
    ]
    if config.eval_output_dir is not None:
        discard_parts(Path(config.eval_output_dir))
    by_model, folders, tables = {}, {}, []
    for candidate in candidates:
        model = first if candidate is candidates[0] else _open(candidate, config, explicit)
        own, others = ([*(labels or ["a value"])] for labels in (model.labels, first.labels))
        if set(own) != set(others) or (model.labels is None) != (first.labels is None):
            raise CheckpointError(
                f"{candidate.path}: its labels are {', '.join(own)}, the others' {', '.join(others)}: "
                "they cannot be compared"
            )
        output = _output_folder(config, model_dir, candidate, data)
        evaluation, files_of_it, table = _evaluate_one(candidate, model, pairs, positive)
        said = {
            "model": os.path.realpath(candidate.path),
            "run_id": run_of(candidate.path) or None,
            "data": data,
            "predict": config.predict,
        }
        described = json.dumps(said, indent=2, ensure_ascii=False) + "\n"
        write_results(output, {**files_of_it, INPUT_FILE: described.encode(errors="surrogateescape")})
        by_model[candidate.name] = evaluation.figures
        folders[candidate.name] = str(output)
        tables.append(table)
    asked = candidates[-1 - len(config.compare or ())].name
    watched = config.metric_for_best_model or source.metrics[0]
    text = tables[0] if len(tables) == 1 else comparison_table(by_model, watched)
    return EvaluationResult(by_model[asked], by_model, folders, len(pairs), text)


def _resolve_files(config: Config) -> tuple[Source, tuple[Path, ...]]:
    """The data to score: data_file, else the dev file, or with `predict` the test file."""
    kind = "test" if config.predict and not config.data_file else "dev"
    named = config.model_copy(update={"dev_file": config.data_file}) if config.data_file else config
    source = resolve_source(named, needs=(kind,))
    for note in source.notes:
        logger.info("%s", note)
    return source, source.test_files if kind == "test" else source.dev_files


def _candidates(config: Config, model_dir: Path) -> list[_Candidate]:
    """The folders to evaluate: checkpoints in numeric order, then the model itself, then what it is compared
    with, each under a name of its own. CheckpointError where one of these is no model folder."""
    found = []
    if config.all_checkpoints:
        found = [_Candidate(p.name, p, p.name) for _, p in list_checkpoints(model_dir)]
        if not found:
            raise CheckpointError(f"{model_dir}: no checkpoint-N in it")
    final = final_folder(model_dir)
    if (final / "config.json").is_file() or not found:
        prefix = model_dir.absolute().name if output_dir_of(model_dir) != model_dir else ""
        found.append(_Candidate("final" if found else str(config.model_dir), final, prefix))
    for other in config.compare or ():
        path = resolve_folder(other, revision=config.revision, cache_dir=config.cache_dir)
        where = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:8]  # x/m and y/m are two models
        found.append(_Candidate(other, final_folder(path), f"{COMPARED}{path.name}-{where}", is_own=False))
    named: dict[str, _Candidate] = {}
    for candidate in found:
        open_model(candidate.path, verify=False)
        more = (f"{candidate.name} ({i})" for i in itertools.count(2))  # another folder may be called `final`
        name = next(name for name in itertools.chain([candidate.name], more) if name not in named)
        named[name] = dataclasses.replace(candidate, name=name)
    return list(named.values())


def _output_folder(
    config: Config, model_dir: Path, candidate: _Candidate, data: list[dict[str, Any]]
) -> Path:
    """Where the files of one model's results on these data go; other data have another folder."""
    if config.eval_output_dir is not None:
        return Path(config.eval_output_dir) / candidate.prefix
    digest = hashlib.sha256()
    for file in data:
        digest.update(os.fsencode(file["path"]) + b"\0" + file["sha256"].encode())
    more = f"+{len(data) - 1}" if len(data) > 1 else ""
    prefix = f"{candidate.prefix}-" if candidate.prefix else ""
    name = f"{prefix}{os.path.basename(data[0]['path'])}{more}-{digest.hexdigest()[:8]}"
    name += f"-first{config.max_eval_samples}" if config.max_eval_samples else ""
    return output_dir_of(model_dir) / "eval" / (name + ("-predict" if config.predict else ""))


def _open(candidate: _Candidate, config: Config, explicit: Collection[str]) -> PairClassifier:
    cut = config.max_seq_length if "max_seq_length" in explicit else None
    if "model_type" in explicit and candidate.is_own:
        check_model_type(read_folder(candidate.path), config.model_type)
    budget = config.per_device_eval_batch_size * config.max_seq_length
    amp, device = config.amp, "cpu" if config.runs_openvino else config.device
    if "amp" not in explicit and amp == "auto":
        amp = "off"  # nothing says what it was trained in
    if "amp" not in explicit and amp not in allowed_precisions(resolve_device(device)):
        logger.warning("trained with amp %s, which this machine does not have: evaluated in float32", amp)
        amp = "off"
    return PairClassifier.from_pretrained(
        candidate.path,
        labels=config.labels if candidate.is_own or "labels" in explicit else None,
        max_seq_length=cut,
        truncation=config.truncation if "truncation" in explicit else None,
        device=device,
        amp=amp,
        engine=config.engine,
        quantize=config.quantize,
        calibration_pairs=config.calibration_file,
        quantize_check=config.quantize_check,
        max_batch_tokens=budget,
        optimize=False,  # the figures are those of training's own evaluation, bit for bit
    )


def _check_task(config: Config, model: PairClassifier, source: Source) -> None:
    """ConfigError where the settings ask for another kind of task or other labels than the model has."""
    kind = "regression" if model.labels is None else "classification"
    if source.regression != (model.labels is None):
        raise ConfigError(f"problem_type: {config.model_dir} is a {kind} model")
    if model.takes_pairs is not None and model.takes_pairs != (source.columns.text_b is not None):
        wanted = "pairs: name the column" if model.takes_pairs else "single texts: only null is allowed"
        raise ConfigError(
            f"text_b_column: found {source.columns.text_b!r}; {config.model_dir} takes {wanted}"
        )
    if config.predict or model.labels is None or source.labels is None:
        return
    if set(source.labels) != set(model.labels):
        found, own = ", ".join(source.labels), ", ".join(model.labels)
        raise ConfigError(f"labels: found {found}; {config.model_dir} was trained for {own}")


def _evaluate_one(
    candidate: _Candidate, model: PairClassifier, pairs: Pairs, positive: str | None
) -> tuple[Evaluation, dict[str, bytes], str]:
    """Score `pairs`: the results, their files by name, and the tables for one model."""
    split = make_split(pairs, model.labels, model.tokenizer, model.max_seq_length, name=candidate.name)
    evaluation = evaluate_split(
        model.scorer, split, model.labels, positive_label=positive, label=candidate.name
    )
    files = result_files(evaluation, split, model.labels)
    if split.targets is None:
        return evaluation, files, f"{len(split)} rows predicted"
    figures = "\n".join(
        f"{key} = {value if isinstance(value, str) else format(value, '.6g')}"
        for key, value in sorted(evaluation.figures.items())
    )
    if model.labels is None:
        return evaluation, files, figures
    matrix = _confusion(evaluation, split, model.labels)
    tables = class_table(model.labels, per_class(matrix)), confusion_table(model.labels, matrix)
    return evaluation, files, "\n\n".join((*tables, figures))
