"""Decoupled AdamW, its parameter groups, the learning-rate schedules and gradient clipping.

AdamW: "Decoupled Weight Decay Regularization" (Loshchilov & Hutter, https://arxiv.org/abs/1711.05101), in
torch's order: the weights decay first. Nothing here waits for the device: clipping, the loss scale and the
masking of a step whose gradients are not finite are numbers that stay on it.
"""

import inspect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bertpair.errors import CheckpointError, list_faults

STATE = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class _Numbers:
    """What one call of `step` applies to every parameter of a group; named as the fused kernel names it."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    grad_scale: Tensor | None
    found_inf: Tensor | None


@dataclass(frozen=True)
class _Tensors:
    """Parameters of one device and type, with their gradients and state, index by index."""

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)


class AdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay, equal to `torch.optim.AdamW`.

    One kernel updates all parameters of a kind where PyTorch has such a one; else operations on lists of
    tensors do. Each parameter's step count is a float32 scalar on its device, because only the device knows
    which steps were skipped.
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
            beta1, beta2 = group["betas"]
            rest = group["eps"], group["weight_decay"], grad_scale, found_inf
            numbers = _Numbers(group["lr"], beta1, beta2, *rest)
            for is_fused, tensors in self._batches(group["params"]):
                (_fused_update if is_fused else _foreach_update)(tensors, numbers)

    def _batches(self, params: Iterable[Tensor]) -> list[tuple[bool, _Tensors]]:
        """The parameters to update, by what updates them, device and type."""
        batches: dict[tuple[bool, torch.device, torch.dtype], _Tensors] = {}
        for param in params:
            if param.grad is None:
                continue
            state = self.state[param]
            if not state:
                state.update(_fresh_state(param))
            key = _has_kernel(param, state["exp_avg"]), param.device, param.dtype
            tensors = batches.setdefault(key, _Tensors())
            tensors.params.append(param)
            tensors.grads.append(param.grad)
            tensors.exp_avgs.append(state["exp_avg"])
            tensors.exp_avg_sqs.append(state["exp_avg_sq"])
            tensors.steps.append(state["step"])
        return [(is_fused, tensors) for (is_fused, _, _), tensors in batches.items()]


def _fresh_state(param: Tensor) -> dict[str, Tensor]:
    step = torch.zeros((), dtype=torch.float32, device=param.device)
    return {"exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param), "step": step}


def _has_kernel(param: Tensor, exp_avg: Tensor) -> bool:
    """Whether the fused kernel updates this parameter."""
    assert param.grad is not None
    # The CPU's kernel ignores strides: a transposed gradient would silently be read wrong.
    alike = param.stride() == param.grad.stride() == exp_avg.stride()
    return param.device.type in ("cpu", "cuda") and param.is_floating_point() and alike


def _foreach_update(tensors: _Tensors, numbers: _Numbers) -> None:
    changing = [*tensors.params, *tensors.exp_avgs, *tensors.exp_avg_sqs, *tensors.steps]
    # The mask costs a copy of weights and state here; the fused kernel has its own.
    before = None if numbers.found_inf is None else [tensor.clone() for tensor in changing]
    grads: Any = tensors.grads
    if numbers.grad_scale is not None:
        grads = torch._foreach_div(grads, numbers.grad_scale)
    torch._foreach_add_(tensors.steps, 1)
    steps = torch.stack(tensors.steps)
    exact = steps if steps.device.type == "mps" else steps.double()  # which has no float64
    correction1, correction2 = 1 - numbers.beta1**exact, 1 - numbers.beta2**exact
    dtype = tensors.params[0].dtype
    negative_step_sizes = (-numbers.lr / correction1).to(dtype).unbind()
    correction2_roots = correction2.sqrt().to(dtype).unbind()

    torch._foreach_mul_(tensors.params, 1 - numbers.lr * numbers.weight_decay)
    torch._foreach_lerp_(tensors.exp_avgs, grads, 1 - numbers.beta1)
    torch._foreach_mul_(tensors.exp_avg_sqs, numbers.beta2)
    torch._foreach_addcmul_(tensors.exp_avg_sqs, grads, grads, 1 - numbers.beta2)
    # The step size divides the denominator, because addcdiv takes no tensor as factor. At a learning rate of
    # 0 the denominator becomes infinite and the update 0, as it should be.
    denominators = torch._foreach_sqrt(tensors.exp_avg_sqs)
    torch._foreach_div_(denominators, correction2_roots)
    torch._foreach_add_(denominators, numbers.eps)
    torch._foreach_div_(denominators, negative_step_sizes)
    torch._foreach_addcdiv_(tensors.params, tensors.exp_avgs, denominators)

    if before is not None and numbers.found_inf is not None:
        skip = numbers.found_inf == 1
        for new, old in zip(changing, before, strict=True):
            new.copy_(torch.where(skip, old, new))


def _fused_update(tensors: _Tensors, numbers: _Numbers) -> None:
    torch._foreach_add_(tensors.steps, 1)
    moments = tensors.exp_avgs, tensors.exp_avg_sqs
    options = {**vars(numbers), "amsgrad": False, "maximize": False}
    torch._fused_adamw_(tensors.params, tensors.grads, *moments, [], tensors.steps, **options)
    if numbers.found_inf is not None:  # the kernel skips the rest by itself
        torch._foreach_sub_(tensors.steps, [numbers.found_inf] * len(tensors.steps))


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
    left = dict(tensors)
    faults: list[str] = []
    pairs: list[tuple[Tensor, Tensor]] = []
    states: dict[Tensor, dict[str, Tensor]] = {}
    updated = {param for group in optimizer.param_groups for param in group["params"]}
    for name, param in names.items():
        if param not in updated:
            continue
        found = {kind: left.pop(f"{kind}.{name}") for kind in STATE if f"{kind}.{name}" in left}
        states[param] = _fresh_state(param.detach()) if found else {}
        for kind, fresh in states[param].items():
            if kind not in found:
                faults.append(f"{kind}.{name}: missing")
            elif (found[kind].shape, found[kind].dtype) != (fresh.shape, fresh.dtype):
                was, allowed = (f"{each.dtype} {tuple(each.shape)}" for each in (found[kind], fresh))
                faults.append(f"{kind}.{name}: found {was}; allowed is {allowed}")
            else:
                pairs.append((fresh, found[kind]))
    faults += [f"{key}: the optimizer has no such parameter" for key in left]
    if faults:
        raise CheckpointError("optimizer state:\n" + list_faults(faults))
    for fresh, tensor in pairs:
        fresh.copy_(tensor)
    optimizer.state.clear()
    optimizer.state.update({param: state for param, state in states.items() if state})


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
    groups = [
        {"params": list(decayed), "weight_decay": weight_decay},
        {"params": [param for param in plain if param not in decayed], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def num_warmup_steps(warmup_steps: int, warmup_ratio: float, total_steps: int) -> int:
    """`warmup_steps` where given (above 0), else that share of all steps, rounded up."""
    return warmup_steps if warmup_steps > 0 else math.ceil(total_steps * warmup_ratio)


def learning_rate_at(
    step: int, *, scheduler: str, learning_rate: float, warmup_steps: int, total_steps: int
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
