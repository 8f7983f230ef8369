"""Each kind of checkpoint that is found in the wild, in both directions."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import write_tiny_bert
from safetensors.torch import load_file, save_file
from test_bert import last_hidden_state
from torch import Tensor
from transformers import BertForMaskedLM, BertForPreTraining, BertForSequenceClassification, BertModel

from bertpair.errors import CheckpointError
from bertpair.model.bert import BertClassifier, BertConfig
from bertpair.model.config import config_json, read_folder
from bertpair.model.pretrained import load_model, load_state, state_tensors

Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]
HEADS = ("bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias")


def make_batch() -> tuple[Tensor, Tensor, Tensor]:
    mask = torch.arange(12) < torch.tensor([12, 5, 9])[:, None]
    return torch.randint(1, 50, (3, 12)), torch.randint(0, 2, (3, 12)), mask


def assert_same_logits(
    ours: BertClassifier, theirs: BertForSequenceClassification, atol: float = 2e-6
) -> None:
    ids, types, mask = make_batch()
    with torch.no_grad():
        expected = theirs.eval()(ids, mask, types).logits
        torch.testing.assert_close(ours.eval()(ids, types, mask), expected, rtol=0, atol=atol)


def load(folder: Path, num_labels: int = 3, **options: bool) -> tuple[BertClassifier, list[str]]:
    return load_model(read_folder(folder), num_labels=num_labels, **options)


def change(folder: Path, change: Change) -> dict[str, Tensor]:
    """Rewrite the weights of `folder`; returns the original ones."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file({name: tensor.contiguous() for name, tensor in change(dict(tensors)).items()}, path)
    return tensors


def without(*names: str) -> Change:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def renamed(old: str, new: str) -> Change:
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def old_norms(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    norms = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, old in norms.items():
        tensors = renamed(new, old)(tensors)
    return tensors


def with_surplus_heads(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    extra = {
        "cls.predictions.bias": torch.full((3,), float("nan")),  # nobody reads it
        "cls.seq_relationship.weight": torch.ones(2, 32),
        "bert.embeddings.position_ids": torch.arange(64)[None],
    }
    return {**tensors, **extra}


@pytest.mark.parametrize(
    "variant",
    [lambda tensors: tensors, renamed("bert.", ""), old_norms, with_surplus_heads],
    ids=["as saved", "no prefix", "gamma and beta", "cls and position_ids"],
)
def test_every_spelling_of_a_checkpoint_has_the_same_logits(hf_folder: Path, variant: Change) -> None:
    theirs = BertForSequenceClassification.from_pretrained(hf_folder)
    change(hf_folder, variant)
    ours, notes = load(hf_folder)
    assert_same_logits(ours, theirs)
    if variant is with_surplus_heads:
        names = "bert.embeddings.position_ids, cls.predictions.bias, cls.seq_relationship.weight"
        assert notes == [f"{hf_folder / 'model.safetensors'}: ignored {names}"]
    else:
        assert notes == []


@pytest.mark.parametrize("kind", ["sharded", "bin", "old bin", "sharded bin"])
def test_every_kind_of_file_has_the_same_logits(hf_folder: Path, kind: str) -> None:
    theirs = BertForSequenceClassification.from_pretrained(hf_folder)
    path = hf_folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    path.unlink()
    if kind == "sharded":
        theirs.save_pretrained(hf_folder, max_shard_size="20KB")
        assert len(list(hf_folder.glob("model-*.safetensors"))) > 2
    elif kind == "sharded bin":
        weight_map = {name: f"pytorch_model-0000{len(name) % 3}.bin" for name in tensors}
        for file in set(weight_map.values()):
            torch.save(
                {name: tensors[name] for name in tensors if weight_map[name] == file}, hf_folder / file
            )
        index = hf_folder / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
    else:
        torch.save(tensors, hf_folder / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "bin")
    ours, notes = load(hf_folder)
    assert_same_logits(ours, theirs)
    assert notes == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_become_float32(hf_folder: Path, dtype: torch.dtype) -> None:
    stored = change(hf_folder, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    for name, tensor in state_tensors(load(hf_folder)[0]).items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, stored[name].to(dtype).float()), name


@pytest.mark.parametrize("kind", [BertModel, BertForPreTraining, BertForMaskedLM])
def test_what_pretraining_leaves_gets_a_new_head(hf_folder: Path, tmp_path: Path, kind: type) -> None:
    other = tmp_path / "other"
    kind.from_pretrained(hf_folder).save_pretrained(other)
    expected = BertModel.from_pretrained(other, add_pooling_layer=kind is not BertForMaskedLM).eval()
    ours, notes = load(other, num_labels=5)
    ids, types, mask = make_batch()
    ours.eval()
    with torch.no_grad():
        hidden = expected(ids, mask, types).last_hidden_state
        found = last_hidden_state(ours, ids, types, mask)
        torch.testing.assert_close(found[mask], hidden[mask], rtol=0, atol=1e-5)
    assert ours(ids, types, mask).shape == (3, 5)
    pooler_is_new = kind is BertForMaskedLM
    assert notes[-1] == "new layers, still random: " + (
        "pooler, classifier" if pooler_is_new else "classifier"
    )
    assert bool(ours.pooler.bias.any()) != pooler_is_new
    assert any("cls.predictions" in note for note in notes) == (kind is not BertModel)


def test_new_parts_are_initialised_from_the_seed(hf_folder: Path) -> None:
    change(hf_folder, without(*HEADS))
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model, notes = load(hf_folder)
        made.append(model)
        assert notes == ["new layers, still random: pooler, classifier"]
        assert not model.pooler.bias.any()
        assert not model.classifier.bias.any()
        assert model.pooler.weight.std().item() == pytest.approx(0.02, rel=0.2)
    for module in ("pooler", "classifier"):
        weights = [model.get_submodule(module).weight for model in made]
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])


def test_whole_weights_draw_no_random_numbers(hf_folder: Path) -> None:
    before = torch.get_rng_state()
    model = load(hf_folder)[0]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.training


def test_the_model_does_not_hang_on_its_file(hf_folder: Path) -> None:
    model = load(hf_folder)[0]
    before = {name: tensor.clone() for name, tensor in state_tensors(model).items()}
    path = hf_folder / "model.safetensors"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(bytes(size))
    for name, tensor in state_tensors(model).items():
        assert torch.equal(tensor, before[name]), name


def test_the_number_of_outputs_is_that_of_the_data_where_the_config_says_nothing(hf_folder: Path) -> None:
    path = hf_folder / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({name: raw[name] for name in raw if name not in ("id2label", "label2id")}))
    model, notes = load(hf_folder, num_labels=3)
    assert (model.config.num_labels, notes) == (3, [])


def test_no_weights_need_from_scratch(tiny_config_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights in it .*`from_scratch: true`") as caught:
        load(tiny_config_folder)
    assert "model.safetensors" in str(caught.value)
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model, notes = load(tiny_config_folder, num_labels=4, from_scratch=True)
        assert notes == [f"{tiny_config_folder} has no weights: training starts from random ones"]
        made.append(model.embeddings.words.weight)
    assert model.config.num_labels == 4
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_a_config_that_describes_more_than_the_memory_is_refused(tmp_path: Path) -> None:
    shape = {"hidden_size": 65_536, "num_attention_heads": 64, "num_hidden_layers": 40}
    with pytest.raises(CheckpointError, match=r"config.json: describes 2\.77e\+03 GB of weights; this"):
        load(write_tiny_bert(tmp_path / "huge", **shape), num_labels=2, from_scratch=True)


def test_weights_that_are_there_are_loaded_whatever_from_scratch_says(hf_folder: Path) -> None:
    theirs = BertForSequenceClassification.from_pretrained(hf_folder)
    ours, notes = load(hf_folder, from_scratch=True)
    assert_same_logits(ours, theirs)
    assert "from_scratch is for folders without weights" in notes[0]


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_new"])
@pytest.mark.parametrize("layer_norm_eps", [1e-12, 1e-5])
@pytest.mark.parametrize("num_labels", [1, 3])
def test_transformers_loads_what_we_write(
    tmp_path: Path, hidden_act: str, layer_norm_eps: float, num_labels: int
) -> None:
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        hidden_act=hidden_act,
        layer_norm_eps=layer_norm_eps,
        max_position_embeddings=20,
        num_labels=num_labels,
    )
    ours = BertClassifier(config)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, mean=0.1, std=0.3)
    labels = ["a", "b", "c"] if num_labels == 3 else None
    (tmp_path / "config.json").write_bytes(
        config_json(config, labels, {"dtype": "float16"}, takes_pairs=True, header=None)
    )
    save_file(state_tensors(ours), tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs, report = BertForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert_same_logits(ours, theirs)
    again = load_model(read_folder(tmp_path), num_labels=num_labels)[0]
    for name, tensor in state_tensors(again).items():
        assert torch.equal(tensor, state_tensors(ours)[name]), name


def test_the_state_is_that_of_transformers_name_by_name(hf_folder: Path) -> None:
    theirs = BertForSequenceClassification.from_pretrained(hf_folder).state_dict()
    ours = state_tensors(load(hf_folder)[0])
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def test_a_state_goes_back_in_and_only_into_its_own_shape(hf_folder: Path) -> None:
    model = load(hf_folder)[0]
    twin = BertClassifier(model.config)
    load_state(twin, state_tensors(model))
    for name, tensor in state_tensors(twin).items():
        assert torch.equal(tensor, state_tensors(model)[name]), name
    state = state_tensors(model)
    del state["classifier.bias"]
    state["other"] = torch.zeros(1)
    state["classifier.weight"] = torch.zeros(1, 32)
    with pytest.raises(CheckpointError) as caught:
        load_state(twin, state, "checkpoint-7")
    assert str(caught.value).splitlines() == [
        "checkpoint-7: no tensor 'classifier.bias'",
        "checkpoint-7: 'other' is not part of this model",
        "checkpoint-7: 'classifier.weight' has the shape (1, 32); expected (3, 32)",
    ]
    assert torch.equal(twin.classifier.weight, model.classifier.weight)  # nothing was half loaded
