"""AdamW against torch.optim.AdamW, the schedules against transformers, clipping against clip_grad_norm_."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from bertpair.errors import CheckpointError
from bertpair.settings.config import Config
from bertpair.training.optim import (
    AdamW,
    clip_scale,
    gradient_norm,
    learning_rate_at,
    load_state_tensors,
    parameter_groups,
    state_tensors,
)
from bertpair.training.setup import Plan

SHAPES = [(7, 5), (5,), (), (0, 3), (2, 3, 4)]


@pytest.fixture(params=["fused", "plain"])
def update(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What updates the parameters: the kernel where there is one, or one parameter at a time."""
    if request.param == "plain":
        monkeypatch.setattr("bertpair.training.optim._has_kernel", lambda *_: False)
    return str(request.param)


def reference_step(
    param: Tensor, grad: Tensor, state: dict[str, Any], *, lr: float, weight_decay: float
) -> None:
    """AdamW as the paper has it, for one parameter, with betas of 0.9 and 0.999 and an eps of 1e-8."""
    state["step"] += 1
    state["exp_avg"] = 0.9 * state["exp_avg"] + 0.1 * grad
    state["exp_avg_sq"] = 0.999 * state["exp_avg_sq"] + 0.001 * grad * grad
    mean = state["exp_avg"] / (1 - 0.9 ** state["step"])
    root = (state["exp_avg_sq"] / (1 - 0.999 ** state["step"])).sqrt()
    param.copy_(param * (1 - lr * weight_decay) - lr * mean / (root + 1e-8))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20)


def make_parameters(generator: torch.Generator, dtype: torch.dtype) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in SHAPES]


def twins(parameters: Sequence[Tensor]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in parameters]


def largest_difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    pairs = zip(ours, theirs, strict=True)
    return max((a - b).abs().max().item() for a, b in pairs if a.numel())


def grouped(parameters: Sequence[Tensor], decays: tuple[float, float]) -> list[dict[str, Any]]:
    halves = parameters[::2], parameters[1::2]
    return [{"params": list(half), "weight_decay": decay} for half, decay in zip(halves, decays, strict=True)]


def give_gradients(
    generator: torch.Generator, ours: Sequence[nn.Parameter], theirs: Sequence[nn.Parameter], step: int
) -> None:
    """The same random gradients to both; the second parameter gets one only in every third step."""
    for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        scale = 10.0 ** (i - 2)
        mine.grad = torch.randn(mine.shape, generator=generator, dtype=mine.dtype) * scale
        other.grad = mine.grad.clone()
        if i == 1 and step % 3:
            mine.grad = other.grad = None


@pytest.mark.parametrize(
    ("lr", "betas", "eps", "decays"),
    [
        (1e-3, (0.9, 0.999), 1e-8, (0.01, 0.0)),
        (2e-2, (0.8, 0.95), 1e-6, (0.0, 0.3)),
        (0.3, (0.0, 0.5), 1e-3, (1.0, 0.0)),
        (1e-5, (0.95, 0.9999), 1e-12, (0.0, 0.0)),
    ],
)
def test_adamw_matches_torch_over_100_steps_in_float64(
    generator: torch.Generator,
    update: str,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decays: tuple[float, float],
) -> None:
    ours = make_parameters(generator, torch.float64)
    theirs = twins(ours)
    optimizer = AdamW(grouped(ours, decays), lr=lr, betas=betas, eps=eps)
    oracle = torch.optim.AdamW(grouped(theirs, decays), lr=lr, betas=betas, eps=eps, foreach=False)
    for step in range(100):
        if step == 40:  # a parameter added late counts its own steps
            ours.append(nn.Parameter(torch.randn(4, 2, generator=generator, dtype=torch.float64)))
            theirs += twins(ours[-1:])
            optimizer.add_param_group({"params": [ours[-1]], "weight_decay": 0.1, "lr": lr / 3})
            oracle.add_param_group({"params": [theirs[-1]], "weight_decay": 0.1, "lr": lr / 3})
        for group, other in zip(optimizer.param_groups, oracle.param_groups, strict=True):
            group["lr"] = other["lr"] = lr * (100 - step) / 100 if step else 0.0  # as a warm-up begins
        give_gradients(generator, ours, theirs, step)
        optimizer.step()
        oracle.step()
    assert largest_difference(ours, theirs) < 1e-12
    for mine, other in zip(ours, theirs, strict=True):
        for kind in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                optimizer.state[mine][kind], oracle.state[other][kind], rtol=1e-12, atol=0
            )
        assert optimizer.state[mine]["step"].item() == oracle.state[other]["step"].item()


def test_adamw_is_the_papers_formula(generator: torch.Generator, update: str) -> None:
    ours = make_parameters(generator, torch.float64)
    theirs = [p.detach().clone() for p in ours]
    states = [{"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)} for p in theirs]
    optimizer = AdamW(ours, lr=0.01, weight_decay=0.1)
    for _ in range(20):
        for mine, other, state in zip(ours, theirs, states, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator, dtype=mine.dtype)
            reference_step(other, mine.grad.clone(), state, lr=0.01, weight_decay=0.1)
        optimizer.step()
    assert largest_difference(ours, theirs) < 1e-12


def test_adamw_matches_torchs_fused_kernel_in_float32(generator: torch.Generator, update: str) -> None:
    ours = make_parameters(generator, torch.float32)
    theirs = twins(ours)
    optimizer = AdamW(grouped(ours, (0.01, 0.0)), lr=1e-3)
    oracle = torch.optim.AdamW(grouped(theirs, (0.01, 0.0)), lr=1e-3, fused=True)
    for step in range(100):
        give_gradients(generator, ours, theirs, step)
        optimizer.step()
        oracle.step()
    tolerance = 0.0 if update == "fused" else 1e-6
    assert largest_difference(ours, theirs) <= tolerance


def test_strides_of_a_gradient_do_not_matter(generator: torch.Generator, update: str) -> None:
    ours = [nn.Parameter(torch.randn(6, 4, generator=generator).t()), nn.Parameter(torch.randn(8, 2)[:, 0])]
    theirs = [nn.Parameter(p.detach().contiguous()) for p in ours]
    optimizer = AdamW(ours, lr=0.1)
    oracle = torch.optim.AdamW(theirs, lr=0.1, foreach=False)
    for _ in range(3):
        ours[0].grad = torch.randn(4, 6, generator=generator)
        ours[1].grad = torch.randn(8, generator=generator)
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.grad is not None
            other.grad = mine.grad.clone(memory_format=torch.contiguous_format)
        optimizer.step()
        oracle.step()
    assert largest_difference(ours, theirs) < 1e-6


def test_gradients_are_divided_by_grad_scale(generator: torch.Generator, update: str) -> None:
    ours = make_parameters(generator, torch.float64)
    theirs = twins(ours)
    optimizer = AdamW(ours, lr=0.01, eps=1e-3)
    oracle = torch.optim.AdamW(theirs, lr=0.01, eps=1e-3)
    for step in range(10):
        give_gradients(generator, ours, theirs, step)
        for mine in ours:
            if mine.grad is not None:
                mine.grad *= 4096.0
        optimizer.step(grad_scale=torch.tensor(4096.0), found_inf=torch.tensor(0.0))
        oracle.step()
    assert largest_difference(ours, theirs) < 1e-12


@pytest.mark.parametrize("steps_before", [0, 3])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_with_found_inf_changes_nothing(
    generator: torch.Generator, update: str, steps_before: int, bad: float
) -> None:
    ours = make_parameters(generator, torch.float32)
    theirs = twins(ours)
    optimizer = AdamW(ours, lr=0.01)
    oracle = AdamW(theirs, lr=0.01)
    for step in range(steps_before + 3):
        give_gradients(generator, ours, theirs, 0)
        if step == steps_before:
            before = [p.detach().clone() for p in ours]
            for mine in ours:
                assert mine.grad is not None
                mine.grad.fill_(bad)
            optimizer.step(grad_scale=torch.tensor(bad), found_inf=torch.tensor(1.0))
            assert all(torch.equal(a, b) for a, b in zip(ours, before, strict=True))
        else:
            optimizer.step(found_inf=torch.tensor(0.0))
            oracle.step()
    for mine, other in zip(ours, theirs, strict=True):  # as if the skipped step had never been
        assert torch.equal(mine, other)
        for kind, tensor in optimizer.state[mine].items():
            assert torch.equal(tensor, oracle.state[other][kind])


class NoSync(TorchDispatchMode):
    """Refuses operations that hand a tensor's value to Python: on a GPU they wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(name in str(func) for name in ("_local_scalar_dense", "nonzero", "aten.equal"))
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device(generator: torch.Generator, update: str) -> None:
    with pytest.raises(AssertionError), NoSync():
        torch.ones(()).item()
    ours = make_parameters(generator, torch.float32)
    optimizer = AdamW(ours, lr=0.01)
    give_gradients(generator, ours, twins(ours), 0)
    scale, found_inf = torch.tensor(8.0), torch.tensor(0.0)
    with NoSync():
        norm = gradient_norm(ours) / scale
        optimizer.step(grad_scale=clip_scale(norm, 1.0, scale), found_inf=found_inf)
        optimizer.step(grad_scale=clip_scale(norm, 0.0, 2.0))


def model_tree() -> nn.Module:
    torch.manual_seed(3)
    layers = nn.ModuleDict(
        {
            "embeddings": nn.Embedding(11, 4),
            "dense": nn.Linear(4, 4),
            "LayerNorm": nn.LayerNorm(4),
            "bilinear": nn.Bilinear(4, 4, 3, bias=False),
        }
    )
    return nn.ModuleDict({"bert": layers, "classifier": nn.Linear(3, 2)})


def run_steps(model: nn.Module, optimizer: AdamW, generator: torch.Generator, steps: int) -> None:
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def test_state_by_name_resumes_bitwise(update: str) -> None:
    model = model_tree()
    optimizer = AdamW(parameter_groups(model, 0.1), lr=0.01)
    run_steps(model, optimizer, torch.Generator().manual_seed(1), 5)
    names = dict(model.named_parameters())
    saved = {key: tensor.clone() for key, tensor in state_tensors(optimizer, names).items()}
    assert set(saved) == {f"{kind}.{name}" for name in names for kind in ("exp_avg", "exp_avg_sq", "step")}
    twin = copy.deepcopy(model)
    resumed = AdamW(parameter_groups(twin, 0.1), lr=0.01)
    load_state_tensors(resumed, dict(twin.named_parameters()), saved)
    run_steps(model, optimizer, torch.Generator().manual_seed(2), 5)
    run_steps(twin, resumed, torch.Generator().manual_seed(2), 5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    again = state_tensors(resumed, dict(twin.named_parameters()))
    for key, tensor in state_tensors(optimizer, names).items():
        assert torch.equal(tensor, again[key])
    assert saved["step.classifier.bias"].item() == 5  # the copies that were loaded stayed what they were


def test_a_parameter_without_state_stays_without() -> None:
    model = nn.Linear(2, 2)
    names = dict(model.named_parameters())
    optimizer = AdamW(model.parameters(), lr=0.1)
    model.weight.grad = torch.ones(2, 2)
    optimizer.step()
    saved = state_tensors(optimizer, names)
    assert set(saved) == {"exp_avg.weight", "exp_avg_sq.weight", "step.weight"}
    other = AdamW(model.parameters(), lr=0.1)
    model.bias.grad = torch.ones(2)
    other.step()
    load_state_tensors(other, names, saved)
    assert set(state_tensors(other, names)) == set(saved)
    other.state_dict()


def test_state_that_does_not_fit_is_listed_and_changes_nothing() -> None:
    model = nn.Linear(3, 2)
    names = dict(model.named_parameters())
    optimizer = AdamW(model.parameters(), lr=0.1)
    run_steps(model, optimizer, torch.Generator().manual_seed(1), 2)
    good = {key: tensor.clone() for key, tensor in state_tensors(optimizer, names).items()}
    bad = {**good, "exp_avg.weight": torch.zeros(2, 2), "step.weight": torch.zeros((), dtype=torch.int64)}
    bad["exp_avg.head.weight"] = torch.zeros(1)
    bad["exp_avg.bias"] = torch.ones(2)
    del bad["step.bias"]
    with pytest.raises(CheckpointError) as error:
        load_state_tensors(optimizer, names, bad)
    message = str(error.value)
    assert "exp_avg.weight: found torch.float32 (2, 2); allowed is torch.float32 (2, 3)" in message
    assert "step.weight: found torch.int64 (); allowed is torch.float32 ()" in message
    assert "step.bias: missing" in message
    assert "exp_avg.head.weight: the optimizer has no such parameter" in message
    assert all(torch.equal(tensor, good[key]) for key, tensor in state_tensors(optimizer, names).items())


def test_torchs_own_state_dict_and_deepcopy_work() -> None:
    model = model_tree()
    optimizer = AdamW(parameter_groups(model, 0.1), lr=0.01)
    run_steps(model, optimizer, torch.Generator().manual_seed(1), 2)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    third = copy.deepcopy(model)
    third_optimizer = AdamW(parameter_groups(third, 0.7), lr=0.5)
    third_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its_optimizer in ((model, optimizer), (twin, twin_optimizer), (third, third_optimizer)):
        run_steps(each, its_optimizer, torch.Generator().manual_seed(2), 2)
    for a, b, c in zip(model.parameters(), twin.parameters(), third.parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_biases_and_layer_norms_do_not_decay() -> None:
    model = model_tree()
    decayed, plain = parameter_groups(model, 0.25)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    no_decay = ("bias", "LayerNorm")  # the rule by name, on the names a BERT has
    expected = [name for name in names.values() if not any(part in name for part in no_decay)]
    assert [names[id(p)] for p in decayed["params"]] == expected
    assert sorted(names[id(p)] for p in [*decayed["params"], *plain["params"]]) == sorted(names.values())
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.25, 0.0)


def test_layer_norms_of_any_name_do_not_decay() -> None:
    attention = nn.MultiheadAttention(4, 2)
    decayed, plain = parameter_groups(nn.Sequential(nn.LayerNorm(4), attention), 0.1)
    assert len(plain["params"]) == 4
    assert {id(p) for p in decayed["params"]} == {id(attention.in_proj_weight), id(attention.out_proj.weight)}


def test_frozen_and_shared_parameters_are_grouped_once_or_not_at_all() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
    second.weight = first.weight
    first.bias.requires_grad_(False)
    (group,) = parameter_groups(nn.Sequential(first, second), 0.1)
    assert len(group["params"]) == 1 and group["params"][0] is first.weight


SCHEDULES: dict[str, Callable[..., LambdaLR]] = {
    "linear": get_linear_schedule_with_warmup,
    "cosine": get_cosine_schedule_with_warmup,
}


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "constant", "constant_with_warmup"])
@pytest.mark.parametrize(
    ("warmup", "total"), [(0, 1), (0, 100), (10, 100), (1, 7), (7, 7), (20, 7), (33, 1000)]
)
def test_schedules_match_transformers_at_every_step(scheduler: str, warmup: int, total: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=3e-5)
    if scheduler.startswith("constant"):
        oracle = get_constant_schedule_with_warmup(optimizer, warmup)
    else:
        oracle = SCHEDULES[scheduler](optimizer, warmup, total)
    for step in range(total + 1):
        ours = learning_rate_at(
            step, scheduler=scheduler, learning_rate=3e-5, warmup_steps=warmup, total_steps=total
        )
        assert ours == oracle.get_last_lr()[0]
        optimizer.step()
        oracle.step()


def test_past_the_end_no_schedule_rises_again() -> None:
    for scheduler in ("linear", "cosine"):
        rate = learning_rate_at(15, scheduler=scheduler, learning_rate=1.0, warmup_steps=0, total_steps=10)
        assert rate == 0.0


def test_the_warmup_is_in_steps_or_a_part_of_all_steps_rounded_up() -> None:
    for given, warmup in (({"warmup_steps": 5}, 5), ({"warmup_ratio": 0.1}, 11), ({}, 0)):
        config = Config(max_steps=101, learning_rate=1.0, **given)
        plan = Plan(config, 10, ["acc"], has_dev=False)
        for step in range(warmup):
            assert plan.learning_rate(step) == step / warmup
        assert plan.learning_rate(warmup) == 1.0 > plan.learning_rate(warmup + 1)


@contextmanager
def random_gradients(generator: torch.Generator, scale: float) -> Iterator[list[nn.Parameter]]:
    parameters = make_parameters(generator, torch.float32)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator) * scale
    parameters.insert(1, nn.Parameter(torch.ones(3)))  # one without a gradient
    yield parameters


@pytest.mark.parametrize("max_norm", [0.5, 1.0, 1e6])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e5])
def test_norm_and_clipping_match_clip_grad_norm(
    generator: torch.Generator, max_norm: float, scale: float
) -> None:
    with random_gradients(generator, scale) as parameters:
        grads = [p.grad.clone() for p in parameters if p.grad is not None]
        norm = gradient_norm(parameters)
        assert norm.dtype == torch.float32 and norm.shape == ()
        divisor = clip_scale(norm, max_norm, torch.tensor(256.0))
        assert torch.equal(norm, nn.utils.clip_grad_norm_(parameters, max_norm))
        clipped = [p.grad for p in parameters if p.grad is not None]
        for grad, expected in zip(grads, clipped, strict=True):
            torch.testing.assert_close(256.0 * grad / divisor, expected, rtol=5e-7, atol=0)


def test_max_norm_zero_does_not_clip() -> None:
    assert clip_scale(torch.tensor(1e9), 0.0, 64.0).item() == 64.0
    assert clip_scale(torch.tensor(0.0), 1.0).item() == 1.0


def test_gradient_norm_without_gradients_is_zero() -> None:
    assert gradient_norm([]).item() == 0.0
    assert gradient_norm([nn.Parameter(torch.ones(2))]).item() == 0.0
    double = nn.Parameter(torch.ones(2, dtype=torch.float64))
    double.grad = torch.full((2,), 3.0, dtype=torch.float64)
    assert gradient_norm([double]).dtype == torch.float32
