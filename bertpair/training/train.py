"""`train(config)`: from settings to a trained, measured model folder.

Everything a user can have got wrong is found before the first file is written: settings, output folder,
data, model. Then the loop runs, and the final folder comes in one move.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bertpair.checkpoints.atomic import Staging
from bertpair.checkpoints.run_folder import OPTIMIZER_FILE, STATE_FILE, RunFolder, RunState, WriteCheckpoint
from bertpair.console import interruptible, lines_shown
from bertpair.errors import CheckpointError, ConfigError, StoppedError, TrainingError, first_line
from bertpair.evaluation.measure import Evaluation, collapse, detail, evaluate_split, result_files
from bertpair.evaluation.metrics import finite_or_null
from bertpair.evaluation.plots import draw_curves
from bertpair.evaluation.report import class_table
from bertpair.evaluation.scorer import Scorer
from bertpair.model.config import config_json
from bertpair.model.pretrained import load_state, state_tensors, word_table_name
from bertpair.processes import joined
from bertpair.runtime import (
    explain_memory,
    is_out_of_memory,
    random_state,
    release_locals,
    restore_random_state,
    seed_apart,
)
from bertpair.settings.config import Config
from bertpair.settings.contradictions import check_config
from bertpair.settings.stored import TRAINING_ARGS, dump_yaml
from bertpair.training.loop import Loop
from bertpair.training.optim import AdamW, load_state_tensors, parameter_groups
from bertpair.training.optim import state_tensors as optimizer_tensors
from bertpair.training.report import write_report
from bertpair.training.resume import check_same_run, share_start
from bertpair.training.setup import Job, Material, align, prepare
from bertpair.training.step import Stepper
from bertpair.training.tracking import Tracker

logger = logging.getLogger(__name__)

RANDOM = "rng."  # begins the names of random states among a checkpoint's tensors
COLLAPSE_ADVICE = "lower learning_rate, or try warmup_ratio 0.1, another seed, or class_weights balanced"
USED_IDS = "vocabulary.used_ids"  # the compact vocabulary's name there


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What came out of a run."""

    output_dir: str
    global_step: int
    epoch: float
    train_loss: float | None  # mean over the run's steps
    best_metric: float | None  # of the watched metric, over all evaluations
    metrics: dict[str, float | str]  # of the final model on the dev file; empty without one
    save_failed: bool = False  # the last save, or the final folder, could not be written

    def summary(self) -> dict[str, object]:
        """The values of train.py's last line."""
        values = {**dataclasses.asdict(self), "metrics": finite_or_null(self.metrics)}
        del values["save_failed"]
        return values


def train(
    config: Config, *, explicit: Collection[str] | None = None, material: Material | None = None
) -> TrainResult:
    """Fine-tune as `config` says and return what came out; the model is in `config.output_dir`.

    `explicit` names the settings that were given; by default those that `config` was made with. On a resume
    they are compared with the run's own, which hold for all others. `material` is what `read_material` read
    for these settings, where several runs share it.
    Raises ConfigError, DataError or CheckpointError before anything is written; later StoppedError after a
    checkpoint, or TrainingError.
    """
    if not config.runs_training:
        raise ConfigError("do_train is false: there is nothing to train; bertpair.evaluate measures a model")
    given = config.model_fields_set if explicit is None else explicit
    config = check_config(config, training=not config.resume)
    with lines_shown(), interruptible():
        return _train(config, given, material)


def _train(config: Config, given: Collection[str], material: Material | None) -> TrainResult:
    if config.output_dir is None and config.resume != "auto":  # it names a checkpoint and nothing else
        config = config.model_copy(update={"output_dir": str(Path(str(config.resume)).absolute().parent)})
    with (
        joined(config.ddp_timeout) as processes,
        contextlib.closing(RunFolder(Path(str(config.output_dir)), writes=processes.is_first)) as folder,
    ):
        start = share_start(config, given, folder, processes)
        if start.finished is not None and start.checkpoint is None:
            return _stored_result(start.finished)
        job = processes.all_or_none(lambda: prepare(start.config, start.checkpoint, material, processes))
        align(job)
        with explain_memory(job.device):
            run = _Run(job, start.checkpoint, folder)
        if start.finished is not None and run.loop.is_done:
            run.loop.log_end()
            return _stored_result(start.finished)
        return run.run()


def _stored_result(finished: RunState) -> TrainResult:
    logger.info("%s: this run is finished; its result:", finished.folder)
    return TrainResult(**{**finished.state["result"], "output_dir": str(finished.folder)})


class _Run:
    """One prepared run, from its loop to its final folder."""

    def __init__(self, job: Job, start: RunState | None, folder: RunFolder) -> None:
        self.job, self.start, self.folder = job, start, folder
        config, model, device, precision = job.config, job.model, job.device, job.precision
        self.names = dict(model.named_parameters())
        self.used = {} if job.table is None else {USED_IDS: job.table.used}
        betas, decay, cut = (config.adam_beta1, config.adam_beta2), config.weight_decay, config.max_seq_length
        groups = parameter_groups(model, decay)
        self.optimizer = AdamW(groups, config.learning_rate, betas, config.adam_epsilon, decay)
        self.stepper = Stepper(
            model,
            self.optimizer,
            job.objective,
            device=device,
            precision=precision,
            max_grad_norm=config.max_grad_norm,
            processes=job.processes,
        )
        budget, multiple = config.per_device_eval_batch_size * cut, config.pad_to_multiple_of
        self.scorer = Scorer(model, job.pad_id, device, precision, cut, budget, multiple, job.processes)
        self.loop = Loop(job, self.stepper, folder, self._evaluate, self._checkpoint_writer)
        self._has_collapsed = False  # at the evaluation before: it is said once
        self._last: tuple[dict[str, Tensor], Tensor | None] | None = None  # weights, once the best are loaded
        if start is not None:
            self._restore(start)

    def _evaluate(self) -> Evaluation:
        job = self.job
        assert job.dev is not None
        evaluation = evaluate_split(
            self.scorer,
            job.dev,
            job.labels,
            positive_label=job.config.positive_label,
            label_ranks=job.label_ranks,
            label="dev",
        )
        line = collapse(evaluation, job.dev, job.labels)
        if line is not None and not self._has_collapsed:
            logger.warning("dev: %s; if it stays so, %s", line, COLLAPSE_ADVICE)
        self._has_collapsed = line is not None
        return evaluation

    def _restore(self, start: RunState) -> None:
        check_same_run(self.job, start)
        tensors = start.optimizer_tensors()
        used, stored = self.used.get(USED_IDS), tensors.pop(USED_IDS, None)
        if used is not stored and (used is None or stored is None or not torch.equal(used, stored)):
            raise CheckpointError(f"{start.folder}: compact_vocabulary: the data now uses other words")
        states = [name for name in tensors if name.startswith(RANDOM)]
        random = {name.removeprefix(RANDOM): tensors.pop(name) for name in states}
        load_state_tensors(self.optimizer, self.names, tensors)
        self.loop.load_state_dict(start.state)
        # Last: nothing may draw after it.
        rank, device = self.job.processes.rank, self.job.device
        if rank:
            mine = f"{rank}."
            random = {name.removeprefix(mine): random[name] for name in random if name.startswith(mine)}
        if random:
            restore_random_state(random, device)
        else:  # there were fewer processes
            seed_apart(self.job.config.seed, rank, self.loop.progression.global_step)

    def run(self) -> TrainResult:
        trained = sum(p.numel() * p.element_size() for p in self.names.values())
        table, limit = self.job.table, self.job.config.save_total_limit
        left_out = 0 if table is None else (len(table.full) - len(table.used)) * table.full[0].nbytes
        files = self.job.tokenizer.files(self.job.config.max_seq_length)  # up to 40 MB
        weights = trained + left_out + sum(map(len, files.values()))
        sizes = {"weights_bytes": weights, "optimizer_bytes": 2 * trained}
        kept = self.loop.plan.checkpoints_kept(limit)
        self.folder.begin(self.start, num_kept=kept, save_total_limit=limit, **sizes)
        step = self.loop.progression.global_step
        if self.folder.writes:
            tracker = Tracker(self.job.config.report_to, self.folder.path, self.folder.run_id, step)
            self.folder.listeners.append(tracker.record)
        try:
            self.loop.run()
            return self._finish()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            release_locals(error)
            raise TrainingError(self._memory_advice(error)) from error

    def _memory_advice(self, error: Exception) -> str:
        """What ran out of memory, which settings make it less, and what of the work stands."""
        config, step = self.job.config, self.loop.progression.global_step
        batch, groups = config.per_device_train_batch_size, config.gradient_accumulation_steps
        kept = "no checkpoint has been written"
        if found := self.folder.newest_whole():
            kept = f"{found.name} stands: with these two, --resume goes on from it"
        return (
            f"out of memory after step {step} on {self.job.device} ({first_line(error):.160}); "
            f"lower per_device_train_batch_size ({batch}) and raise gradient_accumulation_steps ({groups}) "
            "by the same factor: a step then has the same rows; for an evaluation lower "
            f"per_device_eval_batch_size ({config.per_device_eval_batch_size}); {kept}"
        )

    def _finish(self) -> TrainResult:
        """Choose the weights, measure them, and write the final folder."""
        job, loop, state = self.job, self.loop, self.loop.progression
        try:
            job.processes.raise_if_stopped()
            source = "last"
            if job.config.load_best_model_at_end:
                source = job.processes.share(self._load_best() if self.folder.writes else None)
            if source == "best":
                job.processes.copy_from_first(state_tensors(job.model).values())
            step = state.best_step if source == "best" else state.global_step
            evaluation = None if job.dev is None else loop.last_evaluation.get(step) or self._evaluate()
        except StoppedError as stopped:  # nothing is lost: the last weights are saved
            self._put_back()
            raise loop.kept(stopped) from None
        measured, folder = {} if evaluation is None else evaluation.figures, str(self.folder.path)
        mean_loss, best = self.stepper.meter.mean_loss, state.best_metric
        result = TrainResult(folder, state.global_step, loop.epoch, mean_loss, best, measured)
        if not self.folder.writes:
            return result
        records = self.folder.read_metrics()
        files = {"curves.png": draw_curves(records, loop.plan.metric)} if records else {}
        details = None
        if evaluation is not None and job.dev is not None:
            known = None if job.train.pairs.groups is None else frozenset(job.train.pairs.groups)
            details = detail(evaluation, job.dev, job.labels, known)
            texts = job.config.with_texts
            files |= result_files(evaluation, job.dev, job.labels, details, with_texts=texts)
            if details.classes is not None:
                table = class_table(details.classes)
                logger.info("dev, with the %s weights (step %d):\n%s", source, step, table)
        final = {"weights": source, "weights_step": step, "result": {**result.summary(), "output_dir": None}}
        self.folder.write_final(self._write_model, {**loop.state_dict(), **final}, files)
        if not self.folder.save_failed:
            of_best = source == "best" and step != state.global_step
            said = f"the best weights, of step {step:,}" if of_best else "the last weights"
            said = f"{state.global_step:,} steps; {said}"
            write_report(self.folder.path, job, evaluation, details, records, said)
        return dataclasses.replace(result, save_failed=self.folder.save_failed)

    def _load_best(self) -> str:
        """Put the best checkpoint's weights into the model; "best", or "last" where that cannot be."""
        model, table, step = self.job.model, self.job.table, self.loop.progression.best_step
        if step is None:
            return "last"
        if step == self.loop.progression.global_step:
            return "best"
        try:
            best = self.folder.read_checkpoint(step)
            weights = best.weights()
            kept = {name: tensor.to("cpu", copy=True) for name, tensor in state_tensors(model).items()}
            self._last = kept, None if table is None else table.full
            if table is not None:
                self._whole_table()  # steps done so far are not for the table that comes
                name = word_table_name(model)
                table.full = weights[name].clone()
                weights[name] = table.rows()
            load_state(model, weights, str(best.folder))
        except CheckpointError as error:
            logger.error("the best weights are lost, the last ones are kept instead: %s", error)
            self._put_back()
            return "last"
        return "best"

    def _put_back(self) -> None:
        """Take the last weights again where the best have taken their place."""
        if self._last is not None:
            weights, full = self._last
            load_state(self.job.model, weights, "the last weights")
            if self.job.table is not None and full is not None:
                self.job.table.full = full

    def _checkpoint_writer(self) -> WriteCheckpoint:
        """What writes a checkpoint of this moment, with every process's random state."""
        random: dict[str, Tensor] = {}
        for name, state in random_state(self.job.device).items():
            for rank, held in enumerate(self.job.processes.gather(state.numpy().tobytes())):
                own = RANDOM + (f"{rank}." if rank else "") + name
                random[own] = torch.frombuffer(bytearray(held), dtype=torch.uint8)
        return functools.partial(self._write_checkpoint, random)

    def _write_checkpoint(self, random: Mapping[str, Tensor], staging: Staging, metrics_bytes: int) -> None:
        """A model folder, and all that a resume needs."""
        self._write_model(staging)
        tensors = {**optimizer_tensors(self.optimizer, self.names), **self.used, **random}
        staging.write_tensors(OPTIMIZER_FILE, tensors)
        staging.write_json(STATE_FILE, {**self.loop.state_dict(), "metrics_bytes": metrics_bytes})

    def _write_model(self, staging: Staging) -> None:
        """A whole model folder: what Hugging Face reads, and the settings."""
        job = self.job
        tensors = state_tensors(job.model)
        if job.table is not None:
            tensors[word_table_name(job.model)] = self._whole_table()
        staging.write_tensors("model.safetensors", tensors, {"format": "pt"})
        pairs = job.train.pairs
        kind: dict[str, Any] = {"takes_pairs": pairs.text_b is not None, "header": pairs.header}
        config = config_json(job.model.config, job.labels, job.folder.raw, **kind)
        staging.write_bytes("config.json", config)
        for name, data in job.tokenizer.files(job.config.max_seq_length).items():
            staging.write_bytes(name, data)
        staging.write_bytes(TRAINING_ARGS, dump_yaml(job.config).encode("utf-8"))

    def _whole_table(self) -> Tensor:
        """The word table of a full training, up to the last step whose verdict is read."""
        table, meter = self.job.table, self.stepper.meter
        assert table is not None
        table.catch_up(meter.applied_rates, self.job.config.weight_decay)
        meter.applied_rates.clear()
        return table.whole(self.job.model.embeddings.words.weight)
