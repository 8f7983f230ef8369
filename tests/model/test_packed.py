"""The prepared network gives the plain one's logits: exactly, or as near as its number type allows."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bertpair import ConfigError, PairClassifier
from bertpair.evaluation.classifier import softmax
from bertpair.model.bert import BertClassifier, BertConfig
from bertpair.model.packed import (
    VNNI_FLAGS,
    PackedClassifier,
    PackedLinear,
    PlainLinear,
    check_int8,
    choose_linear,
    int8_linear,
)
from bertpair.runtime import cpu_flags

SMALL = BertConfig(
    vocab_size=200,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=128,
    max_position_embeddings=48,
    num_labels=3,
)


def network(**changes: object) -> BertClassifier:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = BertClassifier(BertConfig(**{**vars(SMALL), **changes}))  # type: ignore[arg-type]
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def batch(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    longest = max(lengths)
    ids = torch.randint(0, 200, (len(lengths), longest), generator=generator)
    types = torch.randint(0, 2, (len(lengths), longest), generator=generator)
    return ids, types, torch.arange(longest) < torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("make", [PlainLinear, PackedLinear])
@pytest.mark.parametrize("lengths", [[1], [17], [40, 7, 13, 22, 3], [9, 9, 9]])
@torch.inference_mode()
def test_float32_equals_the_plain_network(make: object, lengths: list[int]) -> None:
    model = network()
    packed = PackedClassifier(model, make)  # type: ignore[arg-type]
    ids, types, mask = batch(lengths)
    for arguments in ((ids, types, mask), (ids, types, None), (ids, None, mask)):
        assert (packed(*arguments) - model(*arguments)).abs().max() < 2e-6


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_new", "relu"])
@pytest.mark.parametrize("num_hidden_layers", [1, 2])
@torch.inference_mode()
def test_every_activation_and_a_single_layer(hidden_act: str, num_hidden_layers: int) -> None:
    model = network(hidden_act=hidden_act, num_hidden_layers=num_hidden_layers)
    arguments = batch([20, 4, 11])
    for make in (PlainLinear, PackedLinear):
        assert (PackedClassifier(model, make)(*arguments) - model(*arguments)).abs().max() < 2e-6


@torch.inference_mode()
def test_bf16_and_int8_are_near_and_not_equal() -> None:
    model = network()
    arguments = batch([40, 7, 13, 22, 3])
    exact = model(*arguments)
    for make, dtype in ((choose_linear(torch.bfloat16), torch.bfloat16), (PlainLinear, torch.bfloat16)):
        change = (PackedClassifier(model, make, dtype)(*arguments) - exact).abs().max()
        assert 0 < change < 0.1
    assert 0 < (PackedClassifier(model, int8_linear)(*arguments) - exact).abs().max() < 0.2


@torch.inference_mode()
def test_int8_linear_is_the_arithmetic_it_says() -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(48, 32, generator=generator) * torch.logspace(-3, 1, 48)[:, None]
    weight[3] = 0  # a row of zeros has no scale of its own
    bias, x = torch.randn(48, generator=generator), torch.randn(7, 32, generator=generator)
    found = int8_linear(weight, bias, None)(x)
    scale = weight.abs().amax(dim=1).clamp(min=1e-30) / 127
    rounded = (weight / scale[:, None]).round() * scale[:, None]
    low, high = min(0.0, x.min().item()), max(0.0, x.max().item())
    step = (high - low) / (127 if VNNI_FLAGS.isdisjoint(cpu_flags()) else 255)
    zero = round(-low / step)
    seen = ((x / step).round() + zero).clamp(0, 255) - zero
    # one step of an input may round the other way
    bound = 1.01 * step * rounded.abs().sum(dim=1) + 1e-5
    assert ((found - ((seen * step) @ rounded.T + bias)).abs() <= bound).all()
    assert torch.allclose(found[:, 3], bias[3].expand(7))
    check_int8()


def test_packing_is_chosen_where_it_pays(tmp_path: Path) -> None:
    assert choose_linear(torch.float32) in (PlainLinear, PackedLinear)
    assert choose_linear(torch.bfloat16) in (PlainLinear, PackedLinear)
    info = tmp_path / "cpuinfo"
    info.write_text("flags\t\t: fpu avx2 avx512_vnni\n")
    assert VNNI_FLAGS & cpu_flags(info) and not cpu_flags(tmp_path / "nothing")
    info.write_text("flags\t\t: fpu avx2\n")
    assert not VNNI_FLAGS & cpu_flags(info)


PAIRS = [("the cat", "sat"), ("good food " * 5, "中文 数据库"), ("a", "b" * 30), ("bad mat", "the cat sat")]


def test_a_folder_opens_in_each_way_and_says_what_it_is(hf_folder: Path) -> None:
    exact = PairClassifier.from_pretrained(hf_folder, optimize=False)
    assert isinstance(exact.scorer.model, BertClassifier)
    fast = PairClassifier.from_pretrained(hf_folder)
    assert isinstance(fast.scorer.model, PackedClassifier)
    assert np.abs(fast.logits(PAIRS) - exact.logits(PAIRS)).max() < 2e-6
    half = PairClassifier.from_pretrained(hf_folder, amp="bf16")
    small = PairClassifier.from_pretrained(hf_folder, quantize="int8")
    for model in (half, small):
        change = np.abs(softmax(model.logits(PAIRS)) - softmax(exact.logits(PAIRS))).max()
        assert 0 < change < 0.2


def test_what_cannot_stand_together_is_refused(hf_folder: Path) -> None:
    with pytest.raises(ConfigError, match="found amp bf16"):
        PairClassifier.from_pretrained(hf_folder, quantize="int8", amp="bf16")
    with pytest.raises(ConfigError, match="allowed: int8"):
        PairClassifier.from_pretrained(hf_folder, quantize="int4")
