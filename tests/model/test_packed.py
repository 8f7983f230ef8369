"""The prepared network gives the plain one's logits: exactly, or as near as its number type allows."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bertpair import PairClassifier
from bertpair.evaluation.scorer import softmax
from bertpair.model import packed
from bertpair.model.bert import BertClassifier, BertConfig
from bertpair.model.packed import PackedClassifier
from bertpair.runtime import cpu_bf16_flag, cpu_flags

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


@pytest.fixture(params=[True, False], ids=["packed", "not packed"])
def packs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are packed as this build of PyTorch allows, or not at all, as in a build that cannot."""
    assert packed.can_pack(torch.float32)
    if not request.param:
        monkeypatch.setattr(packed, "can_pack", lambda dtype: False)


@pytest.mark.usefixtures("packs")
@pytest.mark.parametrize("lengths", [[1], [17], [40, 7, 13, 22, 3], [9, 9, 9]])
@torch.inference_mode()
def test_float32_equals_the_plain_network(lengths: list[int]) -> None:
    model = network()
    ready = PackedClassifier(model)
    ids, types, mask = batch(lengths)
    for arguments in ((ids, types, mask), (ids, types, None), (ids, None, mask)):
        assert (ready(*arguments) - model(*arguments)).abs().max() < 2e-6


@pytest.mark.usefixtures("packs")
@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_new", "relu"])
@pytest.mark.parametrize("num_hidden_layers", [1, 2])
@torch.inference_mode()
def test_every_activation_and_a_single_layer(hidden_act: str, num_hidden_layers: int) -> None:
    model = network(hidden_act=hidden_act, num_hidden_layers=num_hidden_layers)
    arguments = batch([20, 4, 11])
    assert (PackedClassifier(model)(*arguments) - model(*arguments)).abs().max() < 2e-6


@pytest.mark.usefixtures("packs")
@torch.inference_mode()
def test_bf16_is_near_and_not_equal() -> None:
    model = network()
    arguments = batch([40, 7, 13, 22, 3])
    change = (PackedClassifier(model, torch.bfloat16)(*arguments) - model(*arguments)).abs().max()
    assert 0 < change < 0.1


@pytest.mark.parametrize("level, kept", [("AVX2", ""), ("avx512_core_vnni", "avx512_vnni"), ("ALL", "all")])
def test_the_processor_has_what_onednn_may_use(
    level: str, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("flags\t\t: fpu avx2 avx512_vnni avx512_bf16\n")
    assert cpu_flags(info) == {"fpu", "avx2", "avx512_vnni", "avx512_bf16"} and not cpu_flags(tmp_path / "no")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", level)
    left = {"avx512_vnni", "avx512_bf16"} if kept == "all" else {*kept.split()}
    assert cpu_flags(info) == {"fpu", "avx2"} | left
    assert cpu_bf16_flag(info) == ("avx512_bf16" if kept == "all" else None)


PAIRS = [("the cat", "sat"), ("good food " * 5, "中文 数据库"), ("a", "b" * 30), ("bad mat", "the cat sat")]


def test_a_folder_opens_in_each_way_and_says_what_it_is(hf_folder: Path) -> None:
    exact = PairClassifier.from_pretrained(hf_folder, optimize=False)
    assert isinstance(exact.scorer.model, BertClassifier)
    fast = PairClassifier.from_pretrained(hf_folder)
    assert isinstance(fast.scorer.model, PackedClassifier)
    assert np.abs(fast.logits(PAIRS) - exact.logits(PAIRS)).max() < 2e-6
    half = PairClassifier.from_pretrained(hf_folder, amp="bf16")
    change = np.abs(softmax(half.logits(PAIRS)) - softmax(exact.logits(PAIRS))).max()
    assert 0 < change < 0.2
