"""The network against transformers' BERT and torch's own layer, its initialisation, and the loss."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig as HuggingFaceConfig
from transformers import BertForSequenceClassification

from bertpair.model.bert import BertClassifier, BertConfig, Layer, init_module
from bertpair.model.pretrained import load_state

TINY = BertConfig(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=20,
    num_labels=3,
)
STILL = TINY.model_copy(update=dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
LENGTHS = torch.tensor([12, 5, 1, 9])


def make_twins(**changes: object) -> tuple[BertClassifier, BertForSequenceClassification]:
    """The same random weights, biases and norms included, in our network and in transformers'."""
    config = TINY.model_copy(update=dict(**changes))
    theirs = BertForSequenceClassification(HuggingFaceConfig(**config.model_dump())).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, mean=0.1, std=0.3)
    ours = BertClassifier(config).eval()
    load_state(ours, theirs.state_dict())
    return ours, theirs


def make_batch() -> tuple[Tensor, Tensor, Tensor]:
    """ids, token types and a mask with padded rows."""
    ids = torch.randint(1, TINY.vocab_size, (4, 12))
    return ids, torch.randint(0, 2, (4, 12)), torch.arange(12) < LENGTHS[:, None]


def last_hidden_state(
    model: BertClassifier, ids: Tensor, types: Tensor | None, mask: Tensor | None
) -> Tensor:
    """What the last layer says of every position, (B, L, D)."""
    x = model.embeddings(ids, types)
    for layer in model.layers:
        x = layer(x, x, None if mask is None else mask[:, None, None, :])
    return x


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_new", "relu"])
@pytest.mark.parametrize("layer_norm_eps", [1e-12, 1e-5, 1e-1])
@pytest.mark.parametrize("with_types", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_logits_and_hidden_states_equal_transformers(
    hidden_act: str, layer_norm_eps: float, with_types: bool, padded: bool
) -> None:
    ours, theirs = make_twins(hidden_act=hidden_act, layer_norm_eps=layer_norm_eps)
    ids, types, mask = make_batch()
    token_types = types if with_types else None
    attention = mask if padded else None
    with torch.no_grad():
        expected = theirs(ids, attention, token_types, output_hidden_states=True)
        logits = ours(ids, token_types, attention)
        hidden = last_hidden_state(ours, ids, token_types, attention)
    seen = mask if padded else torch.ones_like(mask)
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=2e-6)
    torch.testing.assert_close(hidden[seen], expected.hidden_states[-1][seen], rtol=0, atol=1e-5)


def test_gradients_equal_those_of_transformers() -> None:
    ours, theirs = make_twins()
    ours.double()
    theirs.double()
    ids, types, mask = make_batch()
    ids[~mask] = 0
    targets = torch.tensor([0, 2, 1, 2])
    F.cross_entropy(ours(ids, types, mask), targets, reduction="sum").div(4).backward()
    theirs(ids, mask, types, labels=targets).loss.backward()
    twin = BertClassifier(TINY).double()
    load_state(twin, {name: parameter.grad for name, parameter in theirs.named_parameters()})
    expected = dict(twin.named_parameters())
    # The loss is taken in float32 here, in float64 there.
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].detach(), rtol=1e-5, atol=1e-7, msg=name)
    assert not ours.embeddings.words.weight.grad[0].any()


@pytest.mark.parametrize("padded", [True, False])
def test_a_layer_equals_that_of_torch(padded: bool) -> None:
    layer = Layer(STILL).double()
    init_module(layer, 0.3)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    reference = nn.TransformerEncoderLayer(
        32, 4, 48, dropout=0.0, activation="gelu", layer_norm_eps=1e-12, norm_first=False, batch_first=True
    ).double()
    attention = layer.attention
    projections = (attention.query, attention.key, attention.value)
    names = {
        "self_attn.in_proj_weight": torch.cat([projection.weight for projection in projections]),
        "self_attn.in_proj_bias": torch.cat([projection.bias for projection in projections]),
        "self_attn.out_proj": attention.out,
        "linear1": layer.up,
        "linear2": layer.down,
        "norm1": layer.attention_norm,
        "norm2": layer.output_norm,
    }
    state = {}
    for name, source in names.items():
        parts = source.state_dict() if isinstance(source, nn.Module) else {"": source}
        state |= {f"{name}.{part}".rstrip("."): tensor for part, tensor in parts.items()}
    reference.load_state_dict(state)
    x = torch.randn(4, 12, 32, dtype=torch.float64)
    mask = torch.arange(12) < LENGTHS[:, None]
    ours = layer(x, x, mask[:, None, None, :] if padded else None)
    theirs = reference(x, src_key_padding_mask=~mask if padded else None)
    seen = mask if padded else torch.ones_like(mask)
    torch.testing.assert_close(ours[seen], theirs[seen], rtol=0, atol=1e-13)


def test_the_last_layer_for_cls_alone_is_exact() -> None:
    model = make_twins()[0].double()
    ids, types, mask = make_batch()
    for attention in (mask, None):
        cls = last_hidden_state(model, ids, types, attention)[:, 0]
        expected = model.classifier(torch.tanh(model.pooler(cls)))
        torch.testing.assert_close(model(ids, types, attention), expected, rtol=0, atol=1e-12)


def test_padding_and_neighbours_do_not_change_a_row() -> None:
    model = make_twins()[0]
    ids, types, mask = make_batch()
    together = model(ids, types, mask)
    noise = torch.where(mask, ids, torch.randint_like(ids, 1, TINY.vocab_size))
    torch.testing.assert_close(model(noise, types, mask), together, rtol=0, atol=0)
    for row, length in enumerate(LENGTHS.tolist()):
        alone = model(ids[row : row + 1, :length], types[row : row + 1, :length])
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=2e-6)


def test_a_mask_of_ones_and_zeros_means_the_same() -> None:
    model = make_twins()[0]
    ids, types, mask = make_batch()
    assert torch.equal(model(ids, types, mask.long()), model(ids, types, mask))


def test_no_rows_give_no_logits() -> None:
    assert BertClassifier(TINY)(torch.zeros(0, 5, dtype=torch.long)).shape == (0, 3)


def test_initialised_as_bert_is() -> None:
    torch.manual_seed(0)  # small tensors stray from their expected spread
    model = BertClassifier(
        TINY.model_copy(update=dict(vocab_size=5000, initializer_range=0.05, pad_token_id=3))
    )
    words = model.embeddings.words.weight
    assert not words[3].any()
    assert words[0].any()
    assert words.std().item() == pytest.approx(0.05, rel=0.02)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.05, rel=0.25), name
            assert abs(parameter.mean().item()) < 0.02, name


def test_initial_weights_follow_the_seed_or_the_generator() -> None:
    def weights(model: BertClassifier) -> Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(weights(BertClassifier(TINY)))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    model = BertClassifier(TINY)
    made = []
    for seed in (1, 1, 2):
        init_module(model, 0.02, torch.Generator().manual_seed(seed))
        made.append(weights(model))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_a_vocabulary_without_padding_trains_every_row() -> None:
    model = BertClassifier(STILL.model_copy(update=dict(pad_token_id=None)))
    model(torch.zeros(2, 4, dtype=torch.long)).sum().backward()
    assert model.embeddings.words.weight.grad[0].any()


@pytest.mark.parametrize(
    ("changes", "is_random"),
    [
        ({}, False),
        ({"hidden_dropout_prob": 0.5, "classifier_dropout": 0.0}, True),
        ({"attention_probs_dropout_prob": 0.5}, True),
        ({"classifier_dropout": 0.5}, True),
    ],
)
def test_each_dropout_acts_in_training_only(changes: dict[str, float], is_random: bool) -> None:
    model = BertClassifier(STILL.model_copy(update=dict(**changes, initializer_range=0.5)))
    ids = make_batch()[0]
    assert torch.equal(model(ids), model(ids)) != is_random
    model.eval()
    assert torch.equal(model(ids), model(ids))


def test_classifier_dropout_defaults_to_that_of_the_hidden_states() -> None:
    assert BertClassifier(TINY.model_copy(update=dict(hidden_dropout_prob=0.3))).dropout.p == 0.3
    config = TINY.model_copy(update=dict(hidden_dropout_prob=0.3, classifier_dropout=0.0))
    assert BertClassifier(config).dropout.p == 0.0
