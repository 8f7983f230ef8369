"""`train(config)`: from settings to a trained, measured model folder.

Everything a user can have got wrong is found before the first file is written: settings, output folder,
data, model. Then the loop runs, and the final folder comes in one move.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shlex
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bertpair.checkpoints.atomic import Staging
from bertpair.checkpoints.run_folder import OPTIMIZER_FILE, STATE_FILE, RunFolder, RunState
from bertpair.console import stop_flag
from bertpair.errors import CheckpointError, ConfigError, StoppedError, TrainingError, first_line
from bertpair.evaluation.classifier import Scorer
from bertpair.evaluation.evaluate import Evaluation, evaluate_split, result_files
from bertpair.evaluation.metrics import finite_or_null
from bertpair.evaluation.plots import draw_curves
from bertpair.model.config import config_json
from bertpair.model.pretrained import WORD_TABLE, load_state, state_tensors
from bertpair.runtime import (
    explain_memory,
    is_out_of_memory,
    random_state,
    release_locals,
    restore_random_state,
)
from bertpair.settings.config import TRAINING_ARGS, Config, check_config, dump_yaml
from bertpair.training.loop import Loop
from bertpair.training.optim import AdamW, load_state_tensors, parameter_groups
from bertpair.training.optim import state_tensors as optimizer_tensors
from bertpair.training.resume import check_same_data, find_start, name_output_dir, warn_of_other_machine
from bertpair.training.setup import Job, prepare
from bertpair.training.step import Stepper

logger = logging.getLogger(__name__)

RANDOM = "rng."  # begins the names of random states among a checkpoint's tensors
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
        values = dataclasses.asdict(self)
        del values["save_failed"]
        return {**values, "metrics": finite_or_null(self.metrics)}


def train(
    config: Config, *, explicit: Collection[str] | None = None, notes: Sequence[str] = ()
) -> TrainResult:
    """Fine-tune as `config` says and return what came out; the model is in `config.output_dir`.

    `explicit` names the settings that were given; by default those that `config` was made with. On a resume
    they are compared with the run's own, which hold for all others.
    Raises ConfigError, DataError or CheckpointError before anything is written; later StoppedError after a
    checkpoint, or TrainingError.
    """
    if not config.runs_training:
        raise ConfigError("do_train is false: there is nothing to train; bertpair.evaluate measures a model")
    given = config.model_fields_set if explicit is None else explicit
    config = check_config(config, training=not config.resume)
    for note in notes:
        logger.info("%s", note)
    config = name_output_dir(config)
    with contextlib.closing(RunFolder(Path(str(config.output_dir)))) as folder:
        start = find_start(config, given, folder)
        if start.finished is not None and start.checkpoint is None:
            return _stored_result(start.finished)
        job = prepare(start.config, start.checkpoint)
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
        config = job.config
        names = dict(job.model.named_parameters())
        optimizer = AdamW(
            parameter_groups(job.model, config.weight_decay),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
        )
        self.stepper = Stepper(
            job.model,
            optimizer,
            job.objective,
            device=job.device,
            precision=job.precision,
            max_grad_norm=config.max_grad_norm,
        )
        self.scorer = Scorer(
            job.model,
            job.pad_id,
            job.device,
            job.precision,
            config.max_seq_length,
            max_batch_tokens=config.per_device_eval_batch_size * config.max_seq_length,
            pad_to_multiple_of=config.pad_to_multiple_of,
        )
        self.optimizer, self.names = optimizer, names
        self._put_back: Callable[[], None] = lambda: None  # the last weights, once the best are loaded
        self.loop = Loop(
            job, self.stepper, folder, evaluate=self._evaluate, write_checkpoint=self._write_checkpoint
        )
        if start is not None:
            self._restore(start)

    def _evaluate(self) -> Evaluation:
        job, positive = self.job, self.job.config.positive_label
        assert job.dev is not None
        return evaluate_split(self.scorer, job.dev, job.labels, positive_label=positive, label="dev")

    def _restore(self, start: RunState) -> None:
        check_same_data(self.job, start)
        warn_of_other_machine(self.job, start)
        tensors = start.optimizer_tensors()
        used, stored = self._used_ids().get(USED_IDS), tensors.pop(USED_IDS, None)
        if (used is None) != (stored is None) or (
            used is not None and stored is not None and not torch.equal(used, stored)
        ):
            raise CheckpointError(f"{start.folder}: compact_vocabulary: the data now uses other words")
        random = {name: tensors.pop(name) for name in list(tensors) if name.startswith(RANDOM)}
        load_state_tensors(self.optimizer, self.names, tensors)
        self.loop.load_state_dict(start.state)
        states = {name.removeprefix(RANDOM): tensor for name, tensor in random.items()}
        restore_random_state(states, self.job.device)  # last: nothing may draw after it

    def _used_ids(self) -> dict[str, Tensor]:
        return {} if self.job.table is None else {USED_IDS: torch.from_numpy(self.job.table.used)}

    def run(self) -> TrainResult:
        trained = sum(p.numel() * p.element_size() for p in self.names.values())
        table, limit = self.job.table, self.job.config.save_total_limit
        left_out = 0 if table is None else (len(table.full) - len(table.used)) * table.full[0].nbytes
        self.folder.begin(
            self.start,
            num_kept=self.loop.plan.checkpoints_kept(limit),
            save_total_limit=limit,
            weights_bytes=trained + left_out,
            optimizer_bytes=2 * trained,
        )
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
        found = self.folder.newest_whole()
        kept = "no checkpoint has been written"
        if found is not None:
            place = shlex.quote(str(found))
            kept = f"{found.name} stands: a new run with --model_name_or_path {place} starts from its weights"
        return (
            f"out of memory after step {step} on {self.job.device} ({first_line(error):.160}); "
            f"lower per_device_train_batch_size ({batch}) and raise gradient_accumulation_steps ({groups}) "
            "by the same factor: a step then has the same rows; for an evaluation lower "
            f"per_device_eval_batch_size ({config.per_device_eval_batch_size}); {kept}"
        )

    def _finish(self) -> TrainResult:
        """Choose the weights, measure them, and write the final folder."""
        source, step, evaluation = self._measured()
        result = TrainResult(
            output_dir=str(self.folder.path),
            global_step=self.loop.progression.global_step,
            epoch=self.loop.epoch,
            train_loss=self.stepper.meter.mean_loss,
            best_metric=self.loop.progression.best_metric,
            metrics={} if evaluation is None else evaluation.figures,
        )
        state = {**self.loop.state_dict(), "weights": source, "weights_step": step}
        state["result"] = {**result.summary(), "output_dir": None}
        self.folder.write_final(self._write_model, state, self._result_files(evaluation))
        return dataclasses.replace(result, save_failed=self.folder.save_failed)

    def _measured(self) -> tuple[str, int | None, Evaluation | None]:
        """The weights chosen (best or last), their step, and how they do on the dev rows.

        A stop here loses nothing either: the last weights are saved, put back first if need be.
        """
        progression = self.loop.progression
        try:
            stop_flag.raise_if_set()
            source = self._load_best() if self.job.config.load_best_model_at_end else "last"
            step = progression.best_step if source == "best" else progression.global_step
            if self.job.dev is None:
                return source, step, None
            return source, step, self.loop.last_evaluation_of(step) or self._evaluate()
        except StoppedError as stopped:
            self._put_back()
            raise self.loop.kept(stopped) from None

    def _load_best(self) -> str:
        """Put the best checkpoint's weights into the model; "best", or "last" where that cannot be."""
        step = self.loop.progression.best_step
        if step is None:
            return "last"
        if step == self.loop.progression.global_step:
            return "best"
        try:
            best = self.folder.read_checkpoint(step)
            weights = best.weights()
            self._put_back = self._weights_kept()
            if self.job.table is not None:
                weights[WORD_TABLE] = self.job.table.replace(weights[WORD_TABLE])
            load_state(self.job.model, weights, str(best.folder))
        except CheckpointError as error:
            logger.error("the best weights are lost, the last ones are kept instead: %s", error)
            self._put_back()
            return "last"
        return "best"

    def _weights_kept(self) -> Callable[[], None]:
        """Keep a copy of the weights as they are now; the function puts it back."""
        model, table = self.job.model, self.job.table
        if table is not None:
            self._whole_table()  # steps done so far are not for the table that comes
        kept = {name: tensor.to("cpu", copy=True) for name, tensor in state_tensors(model).items()}
        full = None if table is None else table.full

        def put_back() -> None:
            load_state(model, kept, "the last weights")
            if table is not None and full is not None:
                table.full = full

        return put_back

    def _result_files(self, evaluation: Evaluation | None) -> dict[str, bytes]:
        records = self.folder.read_metrics()
        files = {"curves.png": draw_curves(records, self.loop.plan.metric)} if records else {}
        if evaluation is not None:
            assert self.job.dev is not None
            files |= result_files(evaluation, self.job.dev, self.job.labels)
        return files

    def _write_checkpoint(self, staging: Staging, metrics_bytes: int) -> None:
        """A model folder, and all that a resume needs."""
        self._write_model(staging)
        random = {RANDOM + name: state for name, state in random_state(self.job.device).items()}
        tensors = {**optimizer_tensors(self.optimizer, self.names), **self._used_ids(), **random}
        staging.write_tensors(OPTIMIZER_FILE, tensors)
        staging.write_json(STATE_FILE, {**self.loop.state_dict(), "metrics_bytes": metrics_bytes})

    def _write_model(self, staging: Staging) -> None:
        """A whole model folder: what Hugging Face reads, and the settings."""
        job = self.job
        tensors = state_tensors(job.model)
        if job.table is not None:
            tensors[WORD_TABLE] = self._whole_table()
        staging.write_tensors("model.safetensors", tensors, {"format": "pt"})
        pairs = job.train.pairs
        config = config_json(
            job.model.config,
            job.labels,
            job.labels is None,
            job.folder.raw,
            takes_pairs=pairs.text_b is not None,
            header=pairs.header,
        )
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
