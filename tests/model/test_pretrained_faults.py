"""What makes a checkpoint unusable, each fault by name; and what a missing or unwanted head needs."""

from pathlib import Path

import pytest
import torch
from test_pretrained import HEADS, change, load, renamed, without
from torch import Tensor

from bertpair.errors import CheckpointError


@pytest.mark.parametrize("lost", [HEADS[0], HEADS[1], HEADS[2], HEADS[3]])
def test_half_a_head_is_damage(hf_folder: Path, lost: str) -> None:
    change(hf_folder, without(lost))
    with pytest.raises(CheckpointError, match=f"model.safetensors: no tensor '{lost}'"):
        load(hf_folder)


def test_missing_surplus_and_misshapen_tensors_are_listed_together(hf_folder: Path) -> None:
    key = "bert.encoder.layer.1.attention.self.key.weight"

    def damage(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["bert.encoder.layer.2.output.dense.bias"] = torch.zeros(32)
        tensors["bert.embeddings.word_embeddings.weight"] = torch.zeros(7, 32)
        return without(key)(tensors)

    change(hf_folder, damage)
    with pytest.raises(CheckpointError) as caught:
        load(hf_folder)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert all(line.startswith(str(hf_folder / "model.safetensors")) for line in lines)
    assert lines[0].endswith(f"no tensor '{key}'")
    assert lines[1].endswith("'bert.encoder.layer.2.output.dense.bias' is not part of this model")
    assert "word_embeddings.weight' has the shape (7, 32); expected (" in lines[2]


def test_a_checkpoint_of_another_family_lists_ten_faults_and_a_count(hf_folder: Path) -> None:
    change(hf_folder, renamed("bert.", "roberta."))
    with pytest.raises(CheckpointError) as caught:
        load(hf_folder)
    lines = str(caught.value).splitlines()
    assert len(lines) == 11
    assert lines[-1].endswith(" more")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_named(hf_folder: Path, value: float) -> None:
    name = "bert.encoder.layer.0.output.dense.weight"

    def damage(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors[name][3, 5] = value
        return tensors

    change(hf_folder, damage)
    with pytest.raises(CheckpointError, match=f"'{name}' holds numbers that are not finite"):
        load(hf_folder)


def test_one_tensor_under_two_spellings_is_refused(hf_folder: Path) -> None:
    change(hf_folder, lambda tensors: {**tensors, "pooler.dense.bias": torch.zeros(32)})
    with pytest.raises(
        CheckpointError, match="'(bert.)?pooler.dense.bias' stands there under another spelling"
    ):
        load(hf_folder)


def test_another_number_of_outputs_needs_a_new_head(hf_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="has 3 outputs, needed are 2; `new_head: true`"):
        load(hf_folder, num_labels=2)
    model, notes = load(hf_folder, num_labels=2, new_head=True)
    assert model.classifier.weight.shape == (2, 32)
    assert model.pooler.bias.any()
    assert "its classifier is replaced by a new one" in notes[0]
    assert notes[1] == "new layers, still random: classifier"


def test_a_new_head_is_new_even_where_the_old_one_would_fit(hf_folder: Path) -> None:
    assert load(hf_folder)[0].classifier.bias.any()
    assert not load(hf_folder, new_head=True)[0].classifier.bias.any()


def test_who_needs_a_trained_head_gets_no_random_one(hf_folder: Path) -> None:
    assert load(hf_folder, require_head=True)[1] == []
    change(hf_folder, without(*HEADS))
    with pytest.raises(CheckpointError, match="holds no pooler and no classifier: train"):
        load(hf_folder, require_head=True)
