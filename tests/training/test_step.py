"""A step under fp16's loss scale, on the CPU: what it logs and does is that of a step without one."""

import numpy as np
import pytest
import torch

from bertpair.data.batching import Batch
from bertpair.model.bert import BertClassifier, BertConfig
from bertpair.runtime import Precision
from bertpair.training.optim import AdamW, parameter_groups
from bertpair.training.step import Objective, Reading, Stepper


def step_once(precision: Precision, max_grad_norm: float) -> tuple[Reading, dict[str, torch.Tensor]]:
    """One step of AdamW with an epsilon that makes the size of the gradient count."""
    torch.manual_seed(3)
    config = BertConfig(50, 32, 2, 4, 64, hidden_dropout_prob=0, attention_probs_dropout_prob=0, num_labels=3)
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
    return stepper.meter.read(), {name: value.detach() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.01])
def test_fp16s_scale_is_seen_neither_in_the_norm_nor_in_the_update(max_grad_norm: float) -> None:
    plain, expected = step_once(Precision("off", ""), max_grad_norm)
    scaled, found = step_once(Precision("fp16", ""), max_grad_norm)
    assert plain.grad_norm is not None and plain.grad_norm > 0.1
    assert scaled.grad_norm == pytest.approx(plain.grad_norm, rel=0.02)
    assert scaled.loss == pytest.approx(plain.loss, rel=0.01) and not scaled.skipped
    before = step_once(Precision("off", ""), 1e-12)[1]
    for name, weight in expected.items():
        moved = (weight - before[name]).norm()
        assert (found[name] - weight).norm() <= 0.05 * moved + 1e-5, name
