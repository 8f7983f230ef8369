"""One optimizer step: micro-batches forward and backward, clipping, the update; and what it measured.

Nothing here waits for the device. A step whose loss or gradient is not finite is masked there: the
weights, the moments and Adam's counter stay as they are, while data and schedule move on. The verdicts
are read with the running sums, at logging steps and before saves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from bertpair.data.batching import Batch, Rows
from bertpair.model.families import Network
from bertpair.processes import ALONE, Processes
from bertpair.runtime import LossScaler, Precision
from bertpair.training.optim import AdamW, clip_scale, gradient_norm


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised: cross-entropy, or squared error where `regression`, which knows neither class
    weights nor label smoothing."""

    regression: bool
    class_weights: Tensor | None = None  # (C,), on the device
    label_smoothing: float = 0.0

    def loss_sum(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss summed over rows, a float32 scalar; divided by `loss_weight` of the same rows it is torch's
        mean. `logits` are (B, C), `targets` (B,) class ids, or values."""
        logits = logits.float()  # bf16 and fp16 are too coarse to sum in
        if self.regression:
            return F.mse_loss(logits.squeeze(1), targets.float(), reduction="sum")
        weight, smoothing = self.class_weights, self.label_smoothing
        return F.cross_entropy(logits, targets, weight=weight, reduction="sum", label_smoothing=smoothing)


def loss_weight(targets: npt.NDArray[np.generic], class_weights: npt.ArrayLike | None = None) -> float:
    """What these rows weigh in a mean of their losses: their number, or the sum of their class weights."""
    if class_weights is None:
        return float(len(targets))
    return float(np.asarray(class_weights, dtype=np.float64)[targets].sum())


@dataclasses.dataclass(frozen=True)
class Step:
    """One step: its number, the rows of its pairs, its learning rate, and the verdicts on the device."""

    number: int
    rows: Rows
    learning_rate: float
    skipped: Tensor  # bool: to be counted and named
    unchanged: Tensor  # bool: the weights stayed as they were, for that reason or an fp16 overflow


class Meter:
    """Running sums that live on the device until somebody reads them."""

    def __init__(self, device: torch.device) -> None:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.window = torch.zeros(2, dtype=dtype, device=device)  # sum of losses, steps: since the last log
        self.total = torch.zeros(2, dtype=dtype, device=device)  # the same over the whole run
        self.in_a_row = 0  # skipped steps up to now, without one that counted
        self.longest = 0  # the longest row of skipped steps in the last verdicts
        self.num_skipped = 0
        self.applied_rates: list[float] = []  # of the steps that changed the weights; their user clears it
        self.pending: list[Step] = []  # those whose verdict nobody has read yet
        self._norm = torch.tensor(float("nan"))

    def add(self, step: Step, loss: Tensor, norm: Tensor) -> None:
        """Note one step; `loss` and `norm` are scalars on the device."""
        counted = ~(step.skipped | ~torch.isfinite(loss))
        one = torch.stack([torch.where(counted, loss, torch.zeros_like(loss)), counted.to(loss.dtype)])
        self.window += one
        self.total += one
        self._norm = norm
        self.pending.append(step)

    def verdicts(self) -> tuple[Step, ...]:
        """Wait for the device and return the steps skipped since the last call; keeps `in_a_row` true."""
        if not self.pending:
            return ()
        flags = torch.stack([torch.stack([step.skipped, step.unchanged]) for step in self.pending]).tolist()
        skipped = []
        self.longest = self.in_a_row
        for step, (is_skipped, is_unchanged) in zip(self.pending, flags, strict=True):
            self.in_a_row = self.in_a_row + 1 if is_skipped else 0
            self.longest = max(self.longest, self.in_a_row)
            if is_skipped:
                skipped.append(step)
            if not is_unchanged:
                self.applied_rates.append(step.learning_rate)
        self.pending.clear()
        self.num_skipped += len(skipped)
        return tuple(skipped)

    def read(self) -> tuple[float | None, float | None]:
        """The mean loss of the steps that counted since the last reading, and the last step's gradient norm
        before clipping; None where there is none that is finite. Call `verdicts` first."""
        norm, (loss, steps) = self._norm.item(), self.window.tolist()
        self.window.zero_()
        return loss / steps if steps else None, norm if np.isfinite(norm) else None

    @property
    def mean_loss(self) -> float | None:
        """Mean training loss over the run so far; waits for the device."""
        loss, steps = self.total.tolist()
        return loss / steps if steps else None

    def state_dict(self) -> dict[str, Any]:
        """Numbers that JSON keeps exactly. Call `verdicts` first."""
        counts = {"in_a_row": self.in_a_row, "num_skipped": self.num_skipped}
        return {"window": self.window.tolist(), "total": self.total.tolist(), **counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for sums, stored in ((self.window, state["window"]), (self.total, state["total"])):
            sums.copy_(torch.tensor(stored, dtype=sums.dtype))
        self.in_a_row, self.num_skipped = state["in_a_row"], state["num_skipped"]


class Stepper:
    """Runs optimizer steps on a model. The gradient of a step is that of the mean over all its rows."""

    def __init__(
        self,
        model: Network,
        optimizer: AdamW,
        objective: Objective,
        *,
        device: torch.device,
        precision: Precision,
        max_grad_norm: float,
        processes: Processes = ALONE,
    ) -> None:
        self.model, self.optimizer, self.objective, self.processes = model, optimizer, objective, processes
        self.device, self.precision = device, precision
        self.scaler = LossScaler(precision.name == "fp16", device)
        self.meter = Meter(device)
        self._max_grad_norm = max_grad_norm
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def step(
        self, number: int, rows: Rows, batches: Iterable[Batch], *, denominator: float, learning_rate: float
    ) -> None:
        """Do step `number` on `rows`, of which `batches` holds this process's; `denominator` is the weight of
        all of them."""
        loss = self._backward(batches, denominator)
        self.processes.sum_gradients(self._parameters, loss)
        norm = gradient_norm(self._parameters) / self.scaler.scale
        found_inf = (~(torch.isfinite(norm) & torch.isfinite(loss))).to(torch.float32)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        divisor = clip_scale(norm, self._max_grad_norm, self.scaler.scale)
        self.optimizer.step(grad_scale=divisor, found_inf=found_inf)
        for parameter in self._parameters:
            parameter.grad = None
        # An overflow of scaled fp16 gradients is the scaler's business, unless it can do no more.
        helpless = self.scaler.scale <= self.scaler.FLOOR
        skipped = ~torch.isfinite(loss) | (found_inf.bool() & helpless)
        self.scaler.update(found_inf)
        self.meter.add(Step(number, rows, learning_rate, skipped, found_inf.bool()), loss, norm)

    def _backward(self, batches: Iterable[Batch], denominator: float) -> Tensor:
        total = torch.zeros((), device=self.device)
        # One context a step: it keeps the converted weights for all batches.
        with self.precision.autocast(self.device):
            for host_batch in batches:
                batch = host_batch.to(self.device)
                assert batch.targets is not None
                logits = self.model(batch.input_ids, batch.token_type_ids, batch.attention_mask)
                with self.precision.paused(self.device):
                    loss = self.objective.loss_sum(logits, batch.targets) / denominator
                    scaled = loss * self.scaler.scale if self.scaler.enabled else loss
                    scaled.backward()  # type: ignore[no-untyped-call]
                total += loss.detach()
        return total
