"""Evaluating model folders: what `python evaluate.py` runs, and `bertpair.evaluate`."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from bertpair.checkpoint import final_folder, list_checkpoints
from bertpair.command_line import config_from_folder
from bertpair.config import Config, check_config
from bertpair.corpus import Encoding
from bertpair.dataset import Source, columns_for, resolve_source
from bertpair.disk import replace_file
from bertpair.errors import CheckpointError, ConfigError
from bertpair.evaluation import Evaluation, confusion_of, evaluate_split, result_files
from bertpair.hub import resolve_folder
from bertpair.inference import PairClassifier
from bertpair.metrics import per_class
from bertpair.preparation import data_settings
from bertpair.report import class_table, comparison_table, confusion_table
from bertpair.runtime import allowed_precisions, resolve_device, set_deterministic, set_threads
from bertpair.tsv import Pairs, read_pairs

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """What evaluating one or several models on one data set gave."""

    metrics: dict[str, float]  # of the model that was asked for; empty for a file without labels
    by_model: dict[str, dict[str, float]]  # every model evaluated, in the table's order
    folders: dict[str, str]  # where each one's files are
    num_rows: int
    text: str  # the tables

    def summary(self) -> dict[str, float]:
        """The values of evaluate.py's last line."""
        return {"n": self.num_rows, **self.metrics}


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """A model folder to evaluate, its name in the table, and where its files go."""

    name: str
    path: Path
    output: Path


def evaluate(
    model_dir: str | Path, data_file: str | Path | None = None, *, output_dir: str | Path | None = None
) -> EvaluationResult:
    """Evaluate the model in `model_dir` on `data_file` (default: the dev file it was trained with).

    Columns and labels are those of the model's training; the files go to `output_dir`, by default
    `eval/<data file>/` in the model folder. Raises ConfigError, DataError or CheckpointError.
    """
    values: dict[str, Any] = {
        **config_from_folder(final_folder(Path(model_dir))),
        "model_dir": str(model_dir),
    }
    values["data_file"] = None if data_file is None else [str(data_file)]
    values["eval_output_dir"] = None if output_dir is None else str(output_dir)
    return evaluate_models(Config(**values))


def evaluate_models(
    config: Config, *, explicit: Collection[str] = (), notes: Sequence[str] = ()
) -> EvaluationResult:
    """Evaluate as `config` says: one model, all checkpoints of a folder, others beside it, or predict.

    `explicit` names the settings that were given rather than taken from the model folder; `notes` are logged.
    """
    config = check_config(config)
    for note in notes:
        logger.info("%s", note)
    set_threads(config.num_threads)
    set_deterministic(config.deterministic)
    source, files = _resolve_files(config)
    candidates = _candidates(config, files)
    first = _open(candidates[0], config, explicit)
    _check_task(config, first, source)
    pairs = read_pairs(
        files,
        columns_for(source, files[0], with_labels=not config.predict),
        labels=first.labels,
        regression=first.labels is None,
        on_bad_row=config.on_bad_row,
        limit=config.max_eval_samples,
    )
    by_model, folders, tables = {}, {}, []
    for candidate in candidates:
        model = first if candidate is candidates[0] else _open(candidate, config, explicit)
        _check_same_labels(first, model, candidate)
        evaluation, table = _evaluate_one(config, candidate, model, pairs)
        by_model[candidate.name] = evaluation.metrics
        folders[candidate.name] = str(candidate.output)
        tables.append(table)
    asked = candidates[-1 - len(config.compare or ())].name
    text = tables[0] if len(tables) == 1 else comparison_table(by_model, _watched(config, source))
    return EvaluationResult(by_model[asked], by_model, folders, len(pairs), text)


def _resolve_files(config: Config) -> tuple[Source, tuple[Path, ...]]:
    """The data to score: data_file, else the dev file, or with `predict` the test file."""
    kind = "test" if config.predict and not config.data_file else "dev"
    settings = data_settings(config)
    if config.data_file:
        settings = dataclasses.replace(settings, dev_file=config.data_file)
    source = resolve_source(settings, needs=(kind,))
    for note in source.notes:
        logger.info("%s", note)
    return source, source.test_files if kind == "test" else source.dev_files


def _candidates(config: Config, files: Sequence[Path]) -> list[_Candidate]:
    """The folders to evaluate: checkpoints in numeric order, then the model itself, then what it is
    compared with."""
    if config.model_dir is None:
        raise ConfigError("model_dir: not set; name a trained folder (or output_dir in config.yaml)")
    model_dir = resolve_folder(config.model_dir, revision=config.revision, cache_dir=config.cache_dir)
    data_name = files[0].name
    given = None if config.eval_output_dir is None else Path(config.eval_output_dir)
    own = given or model_dir / "eval" / data_name
    found = []
    if config.all_checkpoints:
        root = given or model_dir / "eval"
        found = [_Candidate(p.name, p, root / p.name) for _, p in list_checkpoints(model_dir)]
        if not found:
            raise CheckpointError(f"{model_dir}: no checkpoint-N in it")
    final = final_folder(model_dir)
    if (final / "config.json").is_file() or not found:
        found.append(_Candidate("final" if found else str(config.model_dir), final, own))
    for other in config.compare or ():
        path = resolve_folder(other, revision=config.revision, cache_dir=config.cache_dir)
        found.append(_Candidate(other, final_folder(path), own / f"compare-{path.name}"))
    return found


def _open(candidate: _Candidate, config: Config, explicit: Collection[str]) -> PairClassifier:
    cut = config.max_seq_length if "max_seq_length" in explicit else None
    budget = config.per_device_eval_batch_size * config.max_seq_length
    amp = config.amp
    if "amp" not in explicit and amp == "auto":
        amp = "off"  # nothing says what it was trained in
    if "amp" not in explicit and amp not in allowed_precisions(resolve_device(config.device)):
        logger.warning("trained with amp %s, which this machine does not have: evaluated in float32", amp)
        amp = "off"
    return PairClassifier.from_pretrained(
        candidate.path,
        max_seq_length=cut,
        device=config.device,
        amp=amp,
        max_batch_tokens=budget,
        optimize=False,  # the figures are those of training's own evaluation, bit for bit
    )


def _check_task(config: Config, model: PairClassifier, source: Source) -> None:
    """ConfigError where the settings ask for another kind of task or other labels than the model has."""
    kind = "regression" if model.labels is None else "classification"
    if source.regression != (model.labels is None):
        raise ConfigError(f"problem_type: {config.model_dir} is a {kind} model")
    if config.predict or model.labels is None or source.labels is None:
        return
    if set(source.labels) != set(model.labels):
        found, own = ", ".join(source.labels), ", ".join(model.labels)
        raise ConfigError(f"labels: found {found}; {config.model_dir} was trained for {own}")


def _check_same_labels(first: PairClassifier, model: PairClassifier, candidate: _Candidate) -> None:
    if set(first.labels or ()) != set(model.labels or ()) or (first.labels is None) != (model.labels is None):
        raise CheckpointError(
            f"{candidate.path}: its labels are {', '.join(model.labels or ('a value',))}, the others' "
            f"{', '.join(first.labels or ('a value',))}: they cannot be compared"
        )


def _evaluate_one(
    config: Config, candidate: _Candidate, model: PairClassifier, pairs: Pairs
) -> tuple[Evaluation, str]:
    """Score `pairs`, write the files, and give the tables for one model."""
    cache = Path(config.token_cache_dir) if config.token_cache_dir else None
    encoding = Encoding(model.tokenizer, model.max_seq_length, cache, config.overwrite_cache)
    split = encoding.split(pairs, model.labels, name=candidate.name)
    evaluation = evaluate_split(model.scorer, split, model.labels, label=candidate.name)
    _write_files(candidate.output, result_files(evaluation, split, model.labels))
    if split.targets is None:
        return evaluation, f"{len(split)} rows predicted"
    figures = "\n".join(f"{key} = {value:.6g}" for key, value in sorted(evaluation.metrics.items()))
    if model.labels is None:
        return evaluation, figures
    predicted = evaluation.logits.argmax(axis=1)
    classes = class_table(model.labels, per_class(split.targets, predicted, len(model.labels)))
    confusion = confusion_table(model.labels, confusion_of(evaluation, split, model.labels))
    return evaluation, f"{classes}\n\n{confusion}\n\n{figures}"


def _write_files(folder: Path, files: dict[str, bytes]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            replace_file(folder / name, data)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(
            f"{folder} cannot be written: {reason}; name another place with --output_dir"
        ) from error


def _watched(config: Config, source: Source) -> str:
    return config.metric_for_best_model or source.metrics[0]
