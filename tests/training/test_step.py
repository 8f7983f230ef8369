"""A step under fp16's loss scale, on the CPU: what it logs and does is that of a step without one."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bertpair.data.batching import Batch
from bertpair.model.bert import BertClassifier, BertConfig
from bertpair.runtime import Precision
from bertpair.training.optim import AdamW, parameter_groups
from bertpair.training.step import Objective, Stepper, loss_weight


def step_once(precision: Precision, max_grad_norm: float) -> tuple[float, float, dict[str, torch.Tensor]]:
    """One step of AdamW with an epsilon that makes the size of the gradient count: loss, norm and weights."""
    torch.manual_seed(3)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(vocab_size=50, num_labels=3, **shape, **still)
    model = BertClassifier(config)
    optimizer = AdamW(parameter_groups(model, 0.0), lr=1.0, eps=1.0)
    stepper = Stepper(
        model,
        optimizer,
        Objective(regression=False),
        device=torch.device("cpu"),
        precision=precision,
        max_grad_norm=max_grad_norm,
    )
    ids = torch.arange(24).view(3, 8) % 50
    batch = Batch(np.arange(3), ids, torch.zeros_like(ids), None, torch.tensor([0, 2, 1]), 24)
    stepper.step(1, batch.rows, [batch], denominator=3.0, learning_rate=1.0)
    assert stepper.meter.verdicts() == ()
    loss, norm = stepper.meter.read()
    assert loss is not None and norm is not None
    return loss, norm, {name: value.detach() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.01])
def test_fp16s_scale_is_seen_neither_in_the_norm_nor_in_the_update(max_grad_norm: float) -> None:
    plain_loss, plain_norm, expected = step_once(Precision("off", ""), max_grad_norm)
    loss, norm, found = step_once(Precision("fp16", ""), max_grad_norm)
    assert plain_norm > 0.1 and norm == pytest.approx(plain_norm, rel=0.02)
    assert loss == pytest.approx(plain_loss, rel=0.01)
    *_, before = step_once(Precision("off", ""), 1e-12)
    for name, weight in expected.items():
        moved = (weight - before[name]).norm()
        assert (found[name] - weight).norm() <= 0.05 * moved + 1e-5, name


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, [0.2, 3.0, 1.5]])
def test_summed_cross_entropy_over_its_weight_is_the_mean_of_torch(
    smoothing: float, weights: list[float] | None
) -> None:
    logits, targets = torch.randn(10, 3), torch.randint(0, 3, (10,))
    class_weights = None if weights is None else torch.tensor(weights)
    objective = Objective(False, class_weights, smoothing)
    parts = [objective.loss_sum(logits[rows], targets[rows]) for rows in (slice(0, 3), slice(3, 10))]
    mean = sum(parts) / loss_weight(targets.numpy(), weights)
    expected = F.cross_entropy(logits, targets, weight=class_weights, label_smoothing=smoothing)
    torch.testing.assert_close(mean, expected)


def test_summed_squared_error_over_its_weight_is_the_mean_of_torch() -> None:
    logits, targets = torch.randn(10, 1), torch.randn(10)
    mean = Objective(True).loss_sum(logits, targets) / loss_weight(targets.numpy())
    torch.testing.assert_close(mean, F.mse_loss(logits[:, 0], targets))
    one = Objective(True).loss_sum(logits[:1], targets[:1])  # a single row keeps its axis
    torch.testing.assert_close(one, F.mse_loss(logits[0, 0], targets[0]))


def test_the_loss_of_half_precision_logits_is_taken_in_float32() -> None:
    logits, targets = torch.randn(300, 3).bfloat16(), torch.randint(0, 3, (300,))
    loss = Objective(False).loss_sum(logits, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(logits.float(), targets, reduction="sum"))


def test_no_rows_weigh_nothing() -> None:
    assert loss_weight(np.zeros(0, dtype=np.int64)) == 0.0
    assert loss_weight(np.zeros(0, dtype=np.int64), [1.0, 2.0]) == 0.0
