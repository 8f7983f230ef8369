"""Every family of networks against transformers': logits, dropout, gradients, weights in and out."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from bertpair.data.tokenizer import Tokens
from bertpair.errors import CheckpointError
from bertpair.model.compact_vocabulary import compact_model
from bertpair.model.config import config_json, read_folder
from bertpair.model.families import FAMILIES, Network
from bertpair.model.pretrained import load_model, load_state, state_tensors

VOCABULARY, LABELS, LENGTH = 60, ("wrong", "partly", "right"), 14
LENGTHS = torch.tensor([14, 5, 2, 9])
SHAPES = range(5)
BASE = "base"  # the ratios of the base models
OWN = [name for name in FAMILIES if name not in ("xlm-roberta", "camembert")]  # those are RoBERTa's network
DRAWN = [(name, drawn) for name in OWN for drawn in (*SHAPES, BASE)]
DOUBLE = set(FAMILIES) - {"modernbert"}  # transformers turns its queries in float32


def shape_of(model_type: str, drawn: int | str) -> dict[str, Any]:
    """A small configuration in transformers' words: drawn at random, or with the base model's ratios."""
    rng = random.Random(f"{model_type} {drawn}")
    is_base = drawn == BASE
    heads = 12 if is_base else rng.choice([1, 2, 3, 5, 7])
    width = 96 if is_base else heads * rng.choice([4, 6, 10])
    layers = 12 if is_base else rng.randint(1, 5)
    inner = 4 * width if is_base else rng.choice([width // 2 + 1, 3 * width])
    act = "gelu" if is_base else rng.choice(["gelu", "gelu_new", "relu"])
    drops = [0.1, 0.1, 0.1] if is_base else [rng.choice([0.0, 0.1, 0.3]) for _ in range(3)]
    common = {"vocab_size": VOCABULARY, "pad_token_id": 1, "num_labels": len(LABELS)}
    bert = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "hidden_act": act,
        "hidden_dropout_prob": drops[0],
        "attention_probs_dropout_prob": drops[1],
        "classifier_dropout": drops[2],
        "max_position_embeddings": LENGTH + 2,
        "layer_norm_eps": 1e-12 if is_base else rng.choice([1e-12, 1e-5, 1e-2]),
    }
    own: dict[str, dict[str, Any]] = {
        "bert": bert,
        **dict.fromkeys(("roberta", "xlm-roberta", "camembert"), {**bert, "type_vocab_size": 1}),
        "distilbert": {
            "dim": width,
            "n_layers": 6 if is_base else layers,
            "n_heads": heads,
            "hidden_dim": inner,
            "activation": act,
            "dropout": drops[0],
            "attention_dropout": drops[1],
            "seq_classif_dropout": drops[2],
            "max_position_embeddings": LENGTH,
            "sinusoidal_pos_embds": not is_base and rng.random() < 0.5,
        },
        "albert": {
            **{name: value for name, value in bert.items() if name != "classifier_dropout"},
            "classifier_dropout_prob": drops[2],
            "embedding_size": 16 if is_base else rng.choice([4, 7, 20]),
            "num_hidden_groups": 1 if is_base else rng.randint(1, layers),
            "inner_group_num": 1 if is_base else rng.randint(1, 2),
        },
    }
    own["modernbert"] = {
        "hidden_size": width,
        "num_hidden_layers": 22 if is_base else layers,
        "num_attention_heads": heads,
        "intermediate_size": 3 * width // 2 if is_base else inner,
        "hidden_activation": act,
        "classifier_activation": act,
        "max_position_embeddings": LENGTH,
        "norm_eps": 1e-5,
        "embedding_dropout": drops[0],
        "attention_dropout": drops[1],
        "mlp_dropout": drops[2],
        "classifier_dropout": drops[0],
        "classifier_pooling": rng.choice(["cls", "mean"]),
        "local_attention": rng.choice([4, 7, 12, 128]),
        **{
            name: rng.random() < 0.5
            for name in ("norm_bias", "attention_bias", "mlp_bias", "classifier_bias")
        },
        **{name: rng.choice([500.0, 10_000.0]) for name in ("global_rope_theta", "local_rope_theta")},
        "global_attn_every_n_layers": 3 if is_base else rng.randint(1, 3),
    }
    return {**common, **own[model_type]}


def make_theirs(model_type: str, drawn: int | str, kind: Any = AutoModelForSequenceClassification) -> Any:
    """A random model of transformers', biases and norms included."""
    torch.manual_seed(random.Random(f"{model_type} {drawn}").randrange(2**31))
    config = AutoConfig.for_model(
        model_type,
        **shape_of(model_type, drawn),
        id2label=dict(enumerate(LABELS)),
        label2id={label: i for i, label in enumerate(LABELS)},
    )
    theirs = kind.from_config(config, attn_implementation="eager").eval()
    for name, parameter in theirs.named_parameters():
        is_norm = "norm" in name.lower() and name.endswith("weight")
        std = 0.2 if parameter.ndim == 1 else 0.7 * parameter.shape[1] ** -0.5
        nn.init.normal_(parameter, mean=1.0 if is_norm else 0.0, std=std)
    return theirs


def load(folder: Path, **how: Any) -> Network:
    return load_model(read_folder(folder), num_labels=len(LABELS), **how)[0].eval()


def make_twins(model_type: str, drawn: int | str, folder: Path) -> tuple[Network, PreTrainedModel]:
    """The same weights in our network, read from transformers' folder, and in transformers'."""
    theirs = make_theirs(model_type, drawn)
    theirs.save_pretrained(folder)
    return load(folder, require_head=True), theirs


def write(model: Network, folder: Path, model_type: str) -> Path:
    """A model folder as a run leaves it, without a tokenizer."""
    folder.mkdir()
    save_file(state_tensors(model), folder / "model.safetensors", metadata={"format": "pt"})
    raw = {"model_type": model_type}
    config = config_json(model.config, LABELS, raw, takes_pairs=True, header=None)
    (folder / "config.json").write_bytes(config)
    return folder


def make_batch(is_pair: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """ids, token types and a mask with padded rows."""
    ids = torch.randint(2, VOCABULARY, (4, LENGTH))
    mask = torch.arange(LENGTH) < LENGTHS[:, None]
    types = (torch.arange(LENGTH) >= (LENGTHS // 2)[:, None]) & mask & torch.tensor(is_pair)
    return ids.masked_fill(~mask, 1), types.long(), mask


def logits_of(theirs: Any, ids: Tensor, types: Tensor, mask: Tensor | None) -> Tensor:
    """transformers' logits; token types are given to networks that have some."""
    has_types = getattr(theirs.config, "type_vocab_size", 1) > 1
    logits: Tensor = theirs(
        input_ids=ids, attention_mask=mask, **({"token_type_ids": types} if has_types else {})
    ).logits
    return logits


def check_logits(ours: Network, theirs: PreTrainedModel) -> None:
    """Pairs and single texts, padded and not, in float32 and float64."""
    for dtype, atol in ((torch.float32, 5e-6), (torch.float64, 1e-9)):
        if dtype == torch.float64 and theirs.config.model_type not in DOUBLE:
            continue
        ours.to(dtype)
        theirs.to(dtype)
        for is_pair in (True, False):
            ids, types, mask = make_batch(is_pair)
            with torch.no_grad():
                for rows, length, attention in ((slice(None), LENGTH, mask), (slice(1, 2), 5, None)):
                    given = ids[rows, :length], types[rows, :length]
                    expected = logits_of(theirs, *given, attention)
                    scale = max(1.0, expected.abs().max().item())
                    torch.testing.assert_close(ours(*given, attention), expected, rtol=0, atol=atol * scale)
    ours.float()
    theirs.float()


@pytest.mark.parametrize(("model_type", "drawn"), [*DRAWN, ("xlm-roberta", 0), ("camembert", 0)])
def test_logits_equal_transformers_both_ways(model_type: str, drawn: int | str, tmp_path: Path) -> None:
    ours, theirs = make_twins(model_type, drawn, tmp_path / "theirs")
    assert ours.config.num_labels == len(LABELS)
    check_logits(ours, theirs)
    folder = write(ours, tmp_path / "ours", model_type)
    again = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
    assert type(again) is type(theirs)
    assert [again.config.id2label[i] for i in range(len(LABELS))] == [*LABELS]
    check_logits(ours, again)
    check_logits(load(folder, require_head=True), theirs)


def bent(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """In place of a dropout: a function of its rate and of each value."""
    return x * (1 - p) + p * torch.sin(x) if training else x


def bent_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0
) -> Tensor:
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    return bent(scores.softmax(-1), dropout_p) @ v


@pytest.mark.parametrize(("model_type", "drawn"), DRAWN)
def test_every_dropout_stands_where_it_does_in_transformers(
    model_type: str, drawn: int | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = make_twins(model_type, drawn, tmp_path / "theirs")
    ids, types, mask = make_batch()
    still = logits_of(theirs, ids, types, mask)
    monkeypatch.setattr(F, "dropout", bent)
    monkeypatch.setattr(F, "scaled_dot_product_attention", bent_attention)
    ours.train()
    theirs.train()
    expected = logits_of(theirs, ids, types, mask)
    if any(value for name, value in shape_of(model_type, drawn).items() if "drop" in name):
        assert (expected - still).abs().max() > 1e-4
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(ours(ids, types, mask), expected, rtol=0, atol=5e-6 * scale)


@pytest.mark.parametrize(("model_type", "drawn"), DRAWN)
def test_gradients_equal_those_of_transformers(model_type: str, drawn: int | str, tmp_path: Path) -> None:
    ours, theirs = make_twins(model_type, drawn, tmp_path / "theirs")
    ids, types, mask = make_batch()
    targets = torch.tensor([0, 2, 1, 2])
    if model_type in DOUBLE:  # rounding alone is 2e-5 in the 12 layers of the base ratios
        ours.double()
        theirs.double()
    F.cross_entropy(ours(ids, types, mask), targets).backward()
    F.cross_entropy(logits_of(theirs, ids, types, mask), targets).backward()
    twin = load(tmp_path / "theirs").to(next(ours.parameters()).dtype)
    load_state(
        twin, {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in theirs.named_parameters()}
    )
    expected = {name: parameter.detach() for name, parameter in twin.named_parameters()}
    largest = max(gradient.norm().item() for gradient in expected.values())
    for name, parameter in ours.named_parameters():
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert (found - expected[name]).norm() <= 1e-5 * largest, name


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForMaskedLM])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_pretrained_folder_gives_its_encoder_and_a_new_head(
    model_type: str, kind: Any, tmp_path: Path
) -> None:
    theirs = make_theirs(model_type, 0, kind)
    theirs.save_pretrained(tmp_path)
    family = FAMILIES[model_type]
    folder = read_folder(tmp_path)
    with pytest.raises(CheckpointError, match="train this model first"):
        load_model(folder, num_labels=3, require_head=True)
    model, notes = load_model(folder, num_labels=3)
    assert any(note.startswith("new layers, still random: ") and "classifier" in note for note in notes)
    stored = load_file(tmp_path / "model.safetensors")
    taken = 0
    for name, tensor in state_tensors(model).items():
        bare = name.removeprefix(family.prefix)
        if (found := stored.get(name, stored.get(bare) if bare != name else None)) is not None:
            assert torch.equal(found, tensor), name
            taken += 1
    encoder = [name for name in family.names.values() if name.startswith(family.prefix)]
    assert taken >= len(encoder) - 1, "all of the encoder but perhaps a pooler"
    ids, types, mask = make_batch()
    assert model(ids, types, mask).isfinite().all()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_missing_surplus_and_misshapen_weights_are_listed(model_type: str, tmp_path: Path) -> None:
    make_twins(model_type, 1, tmp_path)
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    lost, bent_one = [name for name in stored if name.startswith(FAMILIES[model_type].prefix)][1:3]
    del stored[lost]
    stored[bent_one] = torch.zeros(3, 1, 2)
    stored["odd.weight"] = torch.zeros(2)
    save_file(stored, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    assert str(caught.value).splitlines() == [
        f"{file}: no tensor {lost!r}",
        f"{file}: 'odd.weight' is not part of this model",
        *[line for line in str(caught.value).splitlines() if bent_one in line and "has the shape" in line],
    ]


@pytest.mark.parametrize("model_type", OWN)
def test_a_new_head_takes_another_number_of_labels(model_type: str, tmp_path: Path) -> None:
    ours, _ = make_twins(model_type, 2, tmp_path)
    folder = read_folder(tmp_path)
    with pytest.raises(CheckpointError, match="new_head: true"):
        load_model(folder, num_labels=5)
    model, notes = load_model(folder, num_labels=5, new_head=True)
    assert any("its classifier is replaced by a new one" in note for note in notes)
    own = dict(ours.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, own[name]) != name.startswith("classifier."), name


@pytest.mark.parametrize("model_type", OWN)
def test_padding_and_neighbours_do_not_change_a_row(model_type: str, tmp_path: Path) -> None:
    model = make_twins(model_type, 3, tmp_path)[0].double()
    ids, types, mask = make_batch()
    for pooling in ("cls", "mean", "max"):
        model.config = model.config.model_copy(update={"pooling": pooling})
        together = model(ids, types, mask)
        noise = torch.where(mask, ids, torch.randint_like(ids, 2, VOCABULARY))
        torch.testing.assert_close(model(noise, types, mask), together, rtol=0, atol=1e-12)
        for row, length in enumerate(LENGTHS.tolist()):
            alone = model(ids[row : row + 1, :length], types[row : row + 1, :length])
            torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-10)


@pytest.mark.parametrize("model_type", OWN)
def test_a_compact_vocabulary_changes_nothing(model_type: str, tmp_path: Path) -> None:
    model = make_twins(model_type, 4, tmp_path)[0]
    ids, types, mask = make_batch()
    expected = model(ids, types, mask)
    rows = [ids[i, :n].tolist() for i, n in enumerate(LENGTHS.tolist())]
    flat = torch.tensor(sum(rows, [])).int().numpy()
    offsets = torch.cat([torch.zeros(1), LENGTHS.cumsum(0)]).long().numpy()
    tokens = Tokens(flat, offsets, LENGTHS.numpy(), mask.any(1).numpy())
    table = compact_model(model, [tokens], 1)
    remapped = table.remap(tokens).ids.tolist()
    small = torch.full_like(ids, table.pad_id)
    small[mask] = torch.tensor(remapped)
    torch.testing.assert_close(model(small, types, mask), expected, rtol=0, atol=0)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_fresh_network_is_initialised_as_in_transformers(model_type: str) -> None:
    shape = shape_of(model_type, 0) | ({"dim": 210} if model_type == "distilbert" else {"hidden_size": 210})
    theirs = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(model_type, **shape))
    ours = fresh(model_type, shape)
    expected = theirs.state_dict()
    for name, tensor in state_tensors(ours).items():
        other = expected[name]
        if other.std(correction=0) == 0:
            assert torch.equal(tensor, other), name
        elif other.numel() >= 2_000:
            assert tensor.std().item() == pytest.approx(other.std().item(), rel=0.12), name
            assert tensor.abs().max().item() == pytest.approx(other.abs().max().item(), rel=0.4), name


def fresh(model_type: str, shape: dict[str, Any]) -> Any:
    config = FAMILIES[model_type].config
    names = {field.alias or name for name, field in config.model_fields.items()}
    return FAMILIES[model_type].network(config(**{n: value for n, value in shape.items() if n in names}))


@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize("model_type", OWN)
def test_transformers_refuses_a_pooling_that_it_does_not_know(
    model_type: str, pooling: str, tmp_path: Path
) -> None:
    model = make_twins(model_type, 2, tmp_path / "theirs")[0]
    before = state_tensors(model)
    model.config = model.config.model_copy(update={"pooling": pooling})
    folder = write(model, tmp_path / "ours", model_type)
    again = load(folder, require_head=True)
    assert again.config == model.config and read_folder(folder).config.pooling == pooling
    ids, types, mask = make_batch()
    assert torch.equal(again(ids, types, mask), model(ids, types, mask))
    if pooling in FAMILIES[model_type].poolings:
        check_logits(model, AutoModelForSequenceClassification.from_pretrained(folder).eval())
        return
    config = json.loads((folder / "config.json").read_text())
    assert config["bertpair"]["pooling"] == pooling
    other = write(model, tmp_path / "other", model_type)
    (other / "config.json").write_text(json.dumps({**config, "bertpair": {"takes_pairs": True}}))
    with pytest.raises(CheckpointError, match="has the shape"):  # answers would be those of another model
        load(other, require_head=True)
    assert load(other).config.pooling == read_folder(tmp_path / "theirs").config.pooling
    with pytest.raises(Exception, match=r"(?s)size mismatch|mismatch|shape"):
        AutoModelForSequenceClassification.from_pretrained(folder)
    encoder = AutoModel.from_pretrained(folder)  # which has no classifier, is another matter
    assert type(encoder).__name__ in type(make_theirs(model_type, 2, AutoModel)).__name__
    for name, tensor in state_tensors(model).items():
        assert torch.equal(tensor.squeeze(0), before[name].squeeze(0)), name


def test_pooling_by_hand() -> None:
    from bertpair.model.pooling import pool, positions_read

    x = torch.randn(2, 4, 3)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    assert torch.equal(pool(positions_read(x, "cls"), mask, "cls"), x[:, 0])
    expected = torch.stack([x[0].mean(0), x[1, :2].mean(0)])
    torch.testing.assert_close(pool(positions_read(x, "mean"), mask, "mean"), expected)
    expected = torch.stack([x[0].amax(0), x[1, :2].amax(0)])
    torch.testing.assert_close(pool(positions_read(x, "max"), mask, "max"), expected)
    for pooling in ("mean", "max"):
        full = pool(x, torch.ones(2, 4), pooling)  # type: ignore[arg-type]
        torch.testing.assert_close(pool(x, None, pooling), full)  # type: ignore[arg-type]
