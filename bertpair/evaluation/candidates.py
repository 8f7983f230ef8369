"""The model folders of one evaluation: found, opened, and where the results of each go."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from bertpair.checkpoints.checkpoint import (
    COMPARED,
    final_folder,
    list_checkpoints,
    open_model,
    output_dir_of,
    run_of,
    weights_digest,
)
from bertpair.errors import CheckpointError
from bertpair.evaluation.classifier import PairClassifier
from bertpair.evaluation.scorer import BATCH_TOKENS
from bertpair.model.config import check_model_type, read_folder
from bertpair.model.pretrained import resolve_folder
from bertpair.runtime import allowed_precisions, resolve_device
from bertpair.settings.config import Config

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A model folder to evaluate, its name in the table, and what its results' folder is called after.

    `prefix` is empty for the model that was asked for; `is_own`: that one or a checkpoint of it.
    """

    name: str
    path: Path
    prefix: str = ""
    is_own: bool = True


def list_candidates(config: Config, model_dir: Path) -> list[Candidate]:
    """The folders to evaluate: checkpoints in numeric order, then the model itself, then what it is compared
    with, each under a name of its own. CheckpointError where one of these is no model folder."""
    found = []
    if config.all_checkpoints:
        found = [Candidate(p.name, p, p.name) for _, p in list_checkpoints(model_dir)]
        if not found:
            raise CheckpointError(f"{model_dir}: no checkpoint-N in it")
    final = final_folder(model_dir)
    if (final / "config.json").is_file() or not found:
        prefix = model_dir.absolute().name if output_dir_of(model_dir) != model_dir else ""
        found.append(Candidate("final" if found else str(config.model_dir), final, prefix))
    for other in config.compare or ():
        path = resolve_folder(other, revision=config.revision, cache_dir=config.cache_dir)
        where = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:8]  # x/m and y/m are two models
        found.append(Candidate(other, final_folder(path), f"{COMPARED}{path.name}-{where}", is_own=False))
    named: dict[str, Candidate] = {}
    for candidate in found:
        open_model(candidate.path, verify=False)
        more = (f"{candidate.name} ({i})" for i in itertools.count(2))  # another folder may be called `final`
        name = next(name for name in itertools.chain([candidate.name], more) if name not in named)
        named[name] = dataclasses.replace(candidate, name=name)
    return list(named.values())


def open_candidate(candidate: Candidate, config: Config, explicit: Collection[str]) -> PairClassifier:
    """The model as `config` wants it to answer; `explicit` names the settings that were given for this
    evaluation. Where figures are measured it computes as training's own evaluation did."""
    cut = config.max_seq_length if "max_seq_length" in explicit else None
    if "model_type" in explicit and candidate.is_own:
        check_model_type(read_folder(candidate.path), config.model_type)
    budget = config.per_device_eval_batch_size * config.max_seq_length
    if config.predict and "per_device_eval_batch_size" not in explicit:
        budget = max(budget, BATCH_TOKENS)
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
        temperature=config.temperature,
        threshold=config.threshold,
        positive_label=config.positive_label,
        max_batch_tokens=budget,
        optimize=config.predict,  # figures are those of training's own evaluation, bit for bit
    )


def check_comparable(candidate: Candidate, model: PairClassifier, first: PairClassifier) -> None:
    """CheckpointError where it does not have the labels of the first one."""
    own, others = ([*(labels or ["a value"])] for labels in (model.labels, first.labels))
    if set(own) != set(others) or (model.labels is None) != (first.labels is None):
        raise CheckpointError(
            f"{candidate.path}: its labels are {', '.join(own)}, the others' {', '.join(others)}: "
            "they cannot be compared"
        )


def results_folder(config: Config, model_dir: Path, candidate: Candidate, data: list[dict[str, Any]]) -> Path:
    """Where the files of one model's results on these data go; other data have another folder."""
    if config.eval_output_dir is not None:
        return Path(config.eval_output_dir) / candidate.prefix
    if not data:
        return output_dir_of(model_dir) / "eval" / "standard_input-predict"
    digest = hashlib.sha256()
    for file in data:
        digest.update(os.fsencode(file["path"]) + b"\0" + file["sha256"].encode())
    more = f"+{len(data) - 1}" if len(data) > 1 else ""
    prefix = f"{candidate.prefix}-" if candidate.prefix else ""
    name = f"{prefix}{os.path.basename(data[0]['path'])}{more}-{digest.hexdigest()[:8]}"
    name += f"-first{config.max_eval_samples}" if config.max_eval_samples else ""
    return output_dir_of(model_dir) / "eval" / (name + ("-predict" if config.predict else ""))


def model_digest(candidate: Candidate, model: PairClassifier) -> str:
    """sha256 of all files that make the model what it is: weights, config.json, tokenizer."""
    files = model.tokenizer.files(max_length=1)  # the cut is no part of the model
    digest = hashlib.sha256(weights_digest(candidate.path).encode())
    for content in (candidate.path.joinpath("config.json").read_bytes(), *map(files.get, sorted(files))):
        digest.update(hashlib.sha256(content or b"").digest())
    return digest.hexdigest()


def describe(
    candidate: Candidate, model: PairClassifier, data: list[dict[str, Any]], *, predict: bool
) -> dict[str, Any]:
    """input.json: what results were made of."""
    said = {"model": os.path.realpath(candidate.path), "run_id": run_of(candidate.path) or None}
    return {**said, "data": data, "predict": predict, **model.decision.figures}
