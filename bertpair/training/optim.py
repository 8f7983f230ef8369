"""Decoupled AdamW, its parameter groups, the learning-rate schedules and gradient clipping.

AdamW: "Decoupled Weight Decay Regularization" (Loshchilov & Hutter, https://arxiv.org/abs/1711.05101), in
torch's order: the weights decay first. Nothing here waits for the device: clipping, the loss scale and the
masking of a step whose gradients are not finite are numbers that stay on it.
"""

import inspect
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bertpair.errors import CheckpointError, list_faults

STATE = ("exp_avg", "exp_avg_sq", "step")
Row = tuple[Tensor, ...]  # a parameter, its gradient, and its state as in STATE


class AdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay, equal to `torch.optim.AdamW`.

    One kernel updates all parameters of a kind on a CPU or a CUDA device. Each parameter's step count is a
    float32 scalar on its device, because only the device knows which steps were skipped.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        # The bare function: torch's wrapper imports its compiler, which takes over a second.
        inspect.unwrap(torch.optim.Optimizer.add_param_group)(self, param_group)

    @torch.no_grad()
    def step(self, *, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        `grad_scale` and `found_inf` are float32 scalars on the parameters' device. Gradients are divided
        by `grad_scale` first (whether in place is not promised). If `found_inf` is 1, nothing changes:
        neither parameters nor moments nor step counts.
        """
        for group in self.param_groups:
            alike: dict[tuple[object, ...], list[Row]] = defaultdict(list)
            for param in group["params"]:
                if param.grad is not None:
                    state = self.state[param]
                    if not state:
                        state.update(_fresh_state(param))
                    row = (param, param.grad, *(state[kind] for kind in STATE))
                    alike[_has_kernel(row), param.device, param.dtype].append(row)
            for (has_kernel, *_), rows in alike.items():
                (_fused_update if has_kernel else _plain_update)(rows, group, grad_scale, found_inf)


def _fresh_state(param: Tensor) -> dict[str, Tensor]:
    step = torch.zeros((), dtype=torch.float32, device=param.device)
    return {"exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param), "step": step}


def _has_kernel(row: Row) -> bool:
    """Whether the fused kernel updates it. The CPU's ignores strides, so that they must be alike."""
    param, grad, exp_avg = row[:3]
    return param.device.type in ("cpu", "cuda") and param.stride() == grad.stride() == exp_avg.stride()


def _fused_update(
    rows: list[Row], group: dict[str, Any], grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    params, grads, exp_avgs, exp_avg_sqs, steps = map(list, zip(*rows, strict=True))
    torch._foreach_add_(steps, 1)
    beta1, beta2 = group["betas"]
    options = {key: group[key] for key in ("lr", "eps", "weight_decay")} | {"beta1": beta1, "beta2": beta2}
    options |= {"grad_scale": grad_scale, "found_inf": found_inf, "amsgrad": False, "maximize": False}
    torch._fused_adamw_(params, grads, exp_avgs, exp_avg_sqs, [], steps, **options)
    if found_inf is not None:  # the kernel skips the rest by itself
        torch._foreach_sub_(steps, [found_inf] * len(steps))


def _plain_update(
    rows: list[Row], group: dict[str, Any], grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    (beta1, beta2), lr, eps = group["betas"], group["lr"], group["eps"]
    for param, grad, exp_avg, exp_avg_sq, step in rows:
        if grad_scale is not None:
            grad = grad / grad_scale
        mean, square, count = torch.lerp(exp_avg, grad, 1 - beta1), beta2 * exp_avg_sq, step + 1
        square.addcmul_(grad, grad, value=1 - beta2)
        exact = count if count.device.type == "mps" else count.double()  # which has no float64
        root = (square / (1 - beta2**exact)).sqrt()
        new = param * (1 - lr * group["weight_decay"]) - lr / (1 - beta1**exact) * mean / (root + eps)
        for old, updated in ((param, new), (exp_avg, mean), (exp_avg_sq, square), (step, count)):
            old.copy_(updated if found_inf is None else torch.where(found_inf == 1, old, updated))


def state_tensors(optimizer: AdamW, names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The optimizer's state by parameter name: "exp_avg.…", "exp_avg_sq.…", "step.…".

    `names` is `dict(model.named_parameters())`. A parameter that was never updated has no entry. The tensors
    are the live ones, not copies.
    """
    updated = [(name, optimizer.state[param]) for name, param in names.items() if optimizer.state.get(param)]
    return {f"{kind}.{name}": state[kind] for name, state in updated for kind in STATE}


def load_state_tensors(optimizer: AdamW, names: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Put back, bitwise, what `state_tensors` gave. CheckpointError lists every entry that does not fit, and
    then nothing has changed."""
    left, states, faults = dict(tensors), {}, []
    updated = {param for group in optimizer.param_groups for param in group["params"]}
    for name, param in names.items():
        kinds = [kind for kind in STATE if f"{kind}.{name}" in left and param in updated]
        if not (found := {kind: left.pop(f"{kind}.{name}") for kind in kinds}):
            continue
        states[param] = _fresh_state(param.detach())
        for kind, fresh in states[param].items():
            if kind not in found:
                faults.append(f"{kind}.{name}: missing")
            elif (found[kind].shape, found[kind].dtype) != (fresh.shape, fresh.dtype):
                was, allowed = (f"{each.dtype} {tuple(each.shape)}" for each in (found[kind], fresh))
                faults.append(f"{kind}.{name}: found {was}; allowed is {allowed}")
            else:
                fresh.copy_(found[kind])
    faults += [f"{key}: the optimizer has no such parameter" for key in left]
    if faults:
        raise CheckpointError("optimizer state:\n" + list_faults(faults))
    optimizer.state.clear()
    optimizer.state.update(states)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Biases and LayerNorm do not decay, all else does, embeddings included. An empty group and frozen
    parameters are left out, shared parameters come once."""
    decayed: dict[Tensor, None] = {}
    plain: dict[Tensor, None] = {}
    for module in model.modules():
        for name, param in module.named_parameters(recurse=False):
            is_plain = isinstance(module, nn.LayerNorm) or name.endswith("bias")
            if param.requires_grad:
                (plain if is_plain else decayed)[param] = None
    groups = (list(decayed), weight_decay), ([param for param in plain if param not in decayed], 0.0)
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]


def learning_rate_at(
    step: int, scheduler: str, learning_rate: float, warmup_steps: int, total_steps: int
) -> float:
    """The learning rate of the update that follows `step` updates, as LambdaLR counts: with a warm-up, the
    first update has learning rate 0, as in run_glue. Both constant schedules warm up if asked to."""
    if step < warmup_steps:
        return learning_rate * (step / max(1, warmup_steps))
    if scheduler.startswith("constant"):
        return learning_rate
    after_warmup = max(1, total_steps - warmup_steps)
    if scheduler == "linear":
        return learning_rate * max(0.0, (total_steps - step) / after_warmup)
    progress = min(1.0, (step - warmup_steps) / after_warmup)
    return learning_rate * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all gradients as one vector: a float32 scalar on their device, 0 if there are none."""
    parameters = list(parameters)
    grads = [param.grad.detach() for param in parameters if param.grad is not None]
    if not grads:
        return torch.zeros((), device=parameters[0].device if parameters else None)
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    return norm.float()


def clip_scale(norm: Tensor, max_norm: float, loss_scale: Tensor | float = 1.0) -> Tensor:
    """`step`'s `grad_scale`: dividing by it takes `loss_scale` off the gradients and clips their norm to
    `max_norm` (0: no clipping). `norm` is that of the gradients without the loss scale."""
    clip = torch.ones_like(norm) if max_norm == 0 else torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    return clip.reciprocal() * loss_scale
