"""The training loop: which step comes next, what happens after it, and what a checkpoint must remember.

At a shared step the order is log, evaluate, save. A stop flag seen after a step, or during an evaluation,
becomes a checkpoint and a StoppedError; an evaluation cut short is noted and runs first on resume.
"""

from __future__ import annotations

import dataclasses
import logging
import shlex
import time
from collections.abc import Callable, Mapping
from typing import Any

from bertpair.checkpoints.run_folder import RunFolder, WriteCheckpoint
from bertpair.console import Progress, is_command, program
from bertpair.data.batching import BatchStream, pad_batch, padded_lengths, slice_batch
from bertpair.errors import StoppedError, TrainingError, plain
from bertpair.evaluation.measure import Evaluation
from bertpair.evaluation.metrics import finite_or_null, is_better
from bertpair.runtime import peak_memory_gb
from bertpair.training.setup import Job, Plan, digest_of, rows_of_step
from bertpair.training.step import Stepper, loss_weight

logger = logging.getLogger(__name__)

READ_VERDICTS_EVERY = 1000  # steps whose masked failures may wait on the device at most
FIRST_RATE_STEPS, FIRST_RATE_SECONDS = 3, 2.0  # done before the first rate is said


@dataclasses.dataclass
class TrainState:
    """How far a run has come; kept in trainer_state.json."""

    global_step: int = 0
    best_metric: float | None = None
    best_step: int | None = None
    evaluations_without_improvement: int = 0
    evaluation_pending: bool = False


class Loop:
    """Drives a `Stepper` over the training rows according to a `Plan`, and keeps the run's folder."""

    def __init__(
        self,
        job: Job,
        stepper: Stepper,
        folder: RunFolder,
        evaluate: Callable[[], Evaluation],
        checkpoint_writer: Callable[[], WriteCheckpoint],
    ) -> None:
        self.job, self.stepper, self.folder, self.processes = job, stepper, folder, job.processes
        self.evaluate, self.checkpoint_writer = evaluate, checkpoint_writer
        config = job.config
        lengths = padded_lengths(job.train.tokens.lengths, config.pad_to_multiple_of, config.max_seq_length)
        rows = rows_of_step(config, job.processes.size)
        self.stream = BatchStream(lengths, rows, seed=config.seed, group_by_length=config.group_by_length)
        has_dev, size = job.dev is not None, job.processes.size
        self.plan = Plan(config, self.stream.num_batches, job.metrics, has_dev=has_dev, num_processes=size)
        self.dev_digest = None if job.dev is None else digest_of(job.dev)
        self.progression = TrainState()
        self.last_evaluation: dict[int | None, Evaluation] = {}  # by the step of its weights
        self._saved_step: int | None = None  # this step is on disk already
        self._unlogged: list[int] = []  # skipped steps that metrics.jsonl does not have yet
        weights = stepper.objective.class_weights
        self._class_weights = None if weights is None else weights.cpu().numpy()
        self._clock = _Clock()
        self._has_said_rate = False

    @property
    def is_done(self) -> bool:
        state, patience = self.progression, self.job.config.early_stopping_patience
        is_out_of_patience = patience is not None and state.evaluations_without_improvement >= patience
        return state.global_step >= self.plan.total_steps or is_out_of_patience

    @property
    def epoch(self) -> float:
        return round(self.progression.global_step / self.plan.steps_per_epoch, 4)

    def log_end(self) -> None:
        """Say why no step is left to do."""
        state, patience = self.progression, self.job.config.early_stopping_patience
        why = "nothing is left to train"
        if state.global_step < self.plan.total_steps:
            why = f"early stopping ended the run after {state.evaluations_without_improvement} evaluations "
            why += f"without a better one; a larger early_stopping_patience than {patience} goes on"
        logger.info("step %d of %d: %s", state.global_step, self.plan.total_steps, why)

    def run(self) -> None:
        """Train to the end of the plan, or until patience runs out.

        Raises StoppedError after a checkpoint, TrainingError after too many skipped steps in a row.
        """
        first = self.progression.global_step
        logger.info("%s", self.plan.describe(first))
        with Progress(self.plan.total_steps, "step", initial=first) as progress:
            self._progress = progress
            try:
                if self.progression.evaluation_pending:
                    self._evaluate()
                self._clock.restart()
                if self.is_done:
                    self.log_end()
                while not self.is_done:
                    self.processes.raise_if_stopped()
                    self._step()
                    self._after_step()
                self._check_verdicts()
                if self.stepper.meter.mean_loss is None:  # the weights are those of the start
                    raise TrainingError(
                        "nothing was trained: every step had a loss or gradient that is not finite; "
                        + self._skipping_advice()
                    )
                if self.plan.save_steps:  # early stopping may end the run at any evaluation
                    self._save()
            except StoppedError as stopped:
                raise self.kept(stopped) from None

    def kept(self, stopped: StoppedError) -> StoppedError:
        """Save the weights as they are, and return `stopped` with how that went."""
        step = self.progression.global_step
        if step == 0:
            return StoppedError(stopped.signum, "before the first step, so there is nothing to keep")
        self._save()
        if self._saved_step is None:
            lost = "the last save failed, and what came after the newest checkpoint is lost"
            return StoppedError(stopped.signum, lost, save_failed=True)
        place = str(self.folder.path)
        go_on = f"bertpair.train(bertpair.Config(output_dir={place!r}, resume=True))"
        if is_command():
            go_on = f"{program('train')} --resume --output_dir {shlex.quote(place)}"
        return StoppedError(stopped.signum, f"saved at step {step}; continue with {go_on}")

    def _step(self) -> None:
        _, _, batch_rows = next(self.stream)
        done, config, train = self.progression.global_step, self.job.config, self.job.train
        assert train.targets is not None
        micro_batch_size = config.per_device_train_batch_size
        micro_batches = [
            pad_batch(
                train.tokens,
                rows,
                pad_id=self.job.pad_id,
                targets=train.targets,
                pad_to_multiple_of=config.pad_to_multiple_of,
                max_length=config.max_seq_length,
            )
            for rows in slice_batch(
                batch_rows,
                rank=self.processes.rank,
                world_size=self.processes.size,
                micro_batch_size=micro_batch_size,
            )
        ]
        lengths = train.tokens.offsets[batch_rows + 1] - train.tokens.offsets[batch_rows]
        self.stepper.step(
            done + 1,
            batch_rows,
            micro_batches,
            denominator=loss_weight(train.targets[batch_rows], self._class_weights),
            learning_rate=self.plan.learning_rate(done),
        )
        self.progression.global_step = done + 1
        self._clock.count(1, len(batch_rows), int(lengths.sum()))
        self._progress.advance()

    def _after_step(self) -> None:
        step, plan = self.progression.global_step, self.plan
        intervals, is_last = (plan.logging_steps, plan.eval_steps, plan.save_steps), step == plan.total_steps
        logs, evaluates, saves = (every > 0 and step % every == 0 for every in intervals)
        if logs or is_last:
            self._log()
        elif not (self._has_said_rate or self._progress.has_bar):
            self._say_first_rate()
        elif len(self.stepper.meter.pending) >= READ_VERDICTS_EVERY:
            self._check_verdicts()
        improved = (evaluates or (is_last and plan.eval_steps > 0)) and self._evaluate()
        if improved or saves:
            self._save()

    def _say_first_rate(self) -> None:
        """Where no bar shows it: how fast the first steps were, long before the first `logging_steps`."""
        if self._clock.num_steps < FIRST_RATE_STEPS or self._clock.seconds < FIRST_RATE_SECONDS:
            return
        self._check_verdicts()
        rate, step = self._clock.rates()["pairs_per_s"], self.progression.global_step
        self._progress.line(f"step {step}/{self.plan.total_steps}  {rate} pairs/s")
        self._has_said_rate = True

    def _log(self) -> None:
        self._check_verdicts()
        self._has_said_rate = True
        mean_loss, norm = self.stepper.meter.read()
        step, memory = self.progression.global_step, round(peak_memory_gb(self.stepper.device), 3)
        rate = self.plan.learning_rate(step - 1)
        record: dict[str, object] = {"step": step, "epoch": self.epoch, "loss": mean_loss, "lr": rate}
        record |= {"grad_norm": norm, **self._clock.rates(), "memory": memory}
        if self._unlogged:
            record["skipped_steps"], self._unlogged = self._unlogged, []
        self.folder.append_metrics(record)
        loss = "-" if mean_loss is None else f"{mean_loss:.4f}"
        self._progress.show(loss=loss, lr=f"{rate:.2g}")
        self._progress.line(
            f"step {step}/{self.plan.total_steps}  epoch {self.epoch:.2f}  loss {loss}  lr {rate:.3g}  "
            f"{record['pairs_per_s']} pairs/s"
        )
        self._clock.restart()

    def _check_verdicts(self) -> None:
        """Wait for the device and read them; the wait is the steps' time."""
        skipped = self.stepper.meter.verdicts()
        self._clock.count()
        for one in skipped:
            rows = ", ".join(map(self.job.train.pairs.where, one.rows.tolist()))
            self._unlogged.append(one.number)
            logger.warning("step %d skipped: its loss or gradient is not finite; rows: %s", one.number, rows)
        longest, most = self.stepper.meter.longest, self.job.config.max_skipped_steps
        if longest > most:
            raise TrainingError(
                f"{longest} steps in a row had a loss or gradient that is not finite "
                f"(max_skipped_steps {most}); {self._skipping_advice()}"
            )

    def _skipping_advice(self) -> str:
        return "lower learning_rate" + ("" if self.stepper.precision.name == "off" else ", or try amp off")

    def _evaluate(self) -> bool:
        """Evaluate now; True where the watched metric improved."""
        state, step, metric = self.progression, self.progression.global_step, self.plan.metric
        self._check_verdicts()  # or the steps that are queued would count as time of the evaluation
        state.evaluation_pending = True
        started = time.monotonic()
        evaluation = self.evaluate()
        state.evaluation_pending = False
        self.last_evaluation = {step: evaluation}
        figures = {f"eval_{name}": value for name, value in evaluation.figures.items()}
        seconds = round(time.monotonic() - started, 3)
        record = {"step": step, "epoch": self.epoch, **finite_or_null(figures), "eval_seconds": seconds}
        self.folder.append_metrics(record)
        value = evaluation.metrics[metric]
        improved = is_better(metric, value, state.best_metric)
        if improved:
            state.best_metric, state.best_step, state.evaluations_without_improvement = value, step, 0
            best = "best so far"
        else:
            state.evaluations_without_improvement += 1
            best = "not finite"
            if state.best_metric is not None:
                best = f"best {state.best_metric:.4f} at step {state.best_step}"
        of = f" of {plain(evaluation.positive_label or '')}" if metric == "f1" else ""
        self._progress.line(f"step {step}  evaluation: {metric}{of} {value:.4f} ({best})")
        self._clock.pass_over()
        return improved

    def _save(self) -> None:
        step = self.progression.global_step
        self._check_verdicts()
        if step != self._saved_step:
            best, write = self.progression.best_step, self.checkpoint_writer()
            saved = self.processes.share(self.folder.save_checkpoint(step, write, best))
            self._saved_step = step if saved else None
        self._clock.pass_over()

    def state_dict(self) -> dict[str, Any]:
        """What trainer_state.json keeps: everything a resume needs beside tensors."""
        return {
            "data_sha256": self.job.data_digest,
            "dev_sha256": self.dev_digest,
            "device": self.job.device.type,
            "processes": self.processes.size,
            "positive_label": self.job.config.positive_label,
            **dataclasses.asdict(self.progression),
            "metric": self.plan.metric,
            "epoch": self.epoch,
            "position": self.stream.state_dict(),
            "meter": self.stepper.meter.state_dict(),
            "scaler": self.stepper.scaler.state_dict(),
            "unlogged_skips": self._unlogged,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave; weights, optimizer and random states are the caller's.

        The best evaluation is forgotten where it is of another metric, or on other rows, than those to come.
        """
        known = TrainState(**{field.name: state[field.name] for field in dataclasses.fields(TrainState)})
        watched = {"metric": self.plan.metric, "dev_sha256": self.dev_digest}
        if self.plan.metric == "f1":
            watched["positive_label"] = self.job.config.positive_label
        has_best = known.best_step is not None and self.dev_digest is not None
        if has_best and any(state.get(name, value) != value for name, value in watched.items()):
            logger.warning("another metric or dev set is watched from here on: the best so far starts anew")
            known = TrainState(known.global_step, evaluation_pending=known.evaluation_pending)
        self.progression, self._saved_step = known, known.global_step
        self.stream.load_state_dict(state["position"])
        self.stepper.meter.load_state_dict(state["meter"])
        self.stepper.scaler.load_state_dict(state["scaler"])
        self._unlogged = list(state.get("unlogged_skips", []))


class _Clock:
    """Rates since the last log line, without what evaluations and saves took."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.num_steps = self._pairs = self._tokens = 0
        self.seconds, self._last = 0.0, time.monotonic()

    def pass_over(self) -> None:
        """Leave out the time since the last step."""
        self._last = time.monotonic()

    def count(self, steps: int = 0, pairs: int = 0, tokens: int = 0) -> None:
        """Count the time since the last step too; without a step it was spent waiting for the device."""
        now = time.monotonic()
        self.seconds, self._last = self.seconds + now - self._last, now
        self.num_steps += steps
        self._pairs += pairs
        self._tokens += tokens

    def rates(self) -> dict[str, float]:
        seconds, steps = max(self.seconds, 1e-9), max(self.num_steps, 1)
        pairs, tokens = round(self._pairs / seconds, 1), round(self._tokens / seconds, 1)
        return {"step_seconds": round(seconds / steps, 4), "pairs_per_s": pairs, "tokens_per_s": tokens}
