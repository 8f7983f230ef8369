"""Training on the rows in use against training on the whole table; the decay that unused rows get."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from bertpair.data.batching import epoch_batches, pad_batch
from bertpair.data.tokenizer import Tokens
from bertpair.model.bert import BertClassifier, BertConfig
from bertpair.model.compact_vocabulary import compact, compact_id, decay, expand, remap, used_ids
from bertpair.training.optim import AdamW, clip_scale, gradient_norm, learning_rate_at, parameter_groups

VOCAB_SIZE, PAD_ID, STEPS = 400, 3, 12
WEIGHT_DECAY = 0.1
CONFIG = BertConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=40,
    hidden_dropout_prob=0.1,
    attention_probs_dropout_prob=0.1,
    max_position_embeddings=32,
    pad_token_id=PAD_ID,
    num_labels=3,
)


def random_tokens(seed: int, low: int = 10, high: int = VOCAB_SIZE, num_rows: int = 40) -> Tokens:
    """Rows whose ids are a sparse sample of low … high."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(3, 20, num_rows)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    alphabet = generator.choice(np.arange(low, high), 60, replace=False)
    return Tokens(
        ids=generator.choice(alphabet, offsets[-1]).astype(np.int32),
        offsets=offsets,
        first_lengths=generator.integers(1, lengths + 1).astype(np.uint16),
        truncated=np.zeros(num_rows, dtype=np.bool_),
    )


def rate(step: int) -> float:
    schedule = {"scheduler": "linear", "learning_rate": 3e-3, "warmup_steps": 3, "total_steps": STEPS}
    return learning_rate_at(step, **schedule)  # type: ignore[arg-type]


def train(
    model: BertClassifier,
    tokens: Tokens,
    pad_id: int,
    *,
    max_grad_norm: float = 0.0,
    skipped: frozenset[int] = frozenset(),
    word_gradients: list[torch.Tensor] | None = None,
) -> AdamW:
    """`STEPS` steps with dropout, drawn anew from one seed; steps in `skipped` are masked."""
    torch.manual_seed(11)
    model.train()
    optimizer = AdamW(parameter_groups(model, WEIGHT_DECAY), lr=1.0)
    targets = np.random.default_rng(0).integers(0, 3, len(tokens))
    batches = [
        batch
        for epoch in range(3)
        for batch in epoch_batches(tokens.lengths, 10, seed=1, epoch=epoch, group_by_length=False)
    ]
    for step in range(STEPS):
        batch = pad_batch(tokens, batches[step], pad_id=pad_id, targets=targets, pad_to_multiple_of=4)
        logits = model(batch.input_ids, batch.token_type_ids, batch.attention_mask)
        assert batch.targets is not None
        F.cross_entropy(logits, batch.targets).backward()
        if word_gradients is not None:
            word_gradients.append(word_table(model).grad.clone())  # type: ignore[union-attr]
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        norm = gradient_norm(model.parameters())
        optimizer.step(
            grad_scale=clip_scale(norm, max_grad_norm), found_inf=torch.tensor(float(step in skipped))
        )
        optimizer.zero_grad(set_to_none=True)
    return optimizer


def word_table(model: BertClassifier) -> torch.nn.Parameter:
    return model.embeddings.words.weight


def build() -> BertClassifier:
    torch.manual_seed(5)
    model = BertClassifier(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def build_compact(full: BertClassifier, used: np.ndarray) -> BertClassifier:
    config = CONFIG.model_copy(update=dict(vocab_size=len(used), pad_token_id=compact_id(PAD_ID, used)))
    model = BertClassifier(config)
    tensors = {name: tensor.clone() for name, tensor in full.state_dict().items()}
    tensors["embeddings.words.weight"] = compact(word_table(full), used)
    model.load_state_dict(tensors)
    return model


def train_both(
    max_grad_norm: float, skipped: frozenset[int] = frozenset()
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """All weights and the word table's moments, after training on the whole and on the compact table."""
    tokens, dev = random_tokens(1), random_tokens(2, low=5, high=300)
    used = used_ids([tokens, dev], [PAD_ID], VOCAB_SIZE)
    whole = build()
    small = build_compact(whole, used)
    initial = word_table(whole).detach().clone()
    options = {"max_grad_norm": max_grad_norm, "skipped": skipped}
    one = train(whole, tokens, PAD_ID, **options)  # type: ignore[arg-type]
    other = train(small, remap(tokens, used, VOCAB_SIZE), compact_id(PAD_ID, used), **options)  # type: ignore[arg-type]
    rates = [rate(step) for step in range(STEPS) if step not in skipped]
    expanded = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    expanded["embeddings.words.weight"] = expand(initial, word_table(small), used, rates, WEIGHT_DECAY)
    expected = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    for kind in ("exp_avg", "exp_avg_sq"):
        expected[kind] = one.state[word_table(whole)][kind]
        expanded[kind] = expand(torch.zeros_like(initial), other.state[word_table(small)][kind], used)
    return expected, expanded


@pytest.mark.parametrize("skipped", [frozenset(), frozenset({2, 7})])
def test_training_on_the_compact_table_equals_training_on_the_whole(skipped: frozenset[int]) -> None:
    """Bitwise: every weight, the rows that no data uses, the padding row, and the moments."""
    expected, expanded = train_both(0.0, skipped)
    assert expected.keys() == expanded.keys()
    different = [name for name in expected if not torch.equal(expected[name], expanded[name])]
    assert different == []


def test_clipping_changes_no_more_than_rounding() -> None:
    """The norm of the table's gradient is summed in another order."""
    expected, expanded = train_both(0.05)
    for name in expected:
        torch.testing.assert_close(expanded[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_full_training_gives_unused_rows_and_padding_no_gradient() -> None:
    """What all of this rests on."""
    tokens = random_tokens(1)
    gradients: list[torch.Tensor] = []
    train(build(), tokens, PAD_ID, word_gradients=gradients)
    unused = np.setdiff1d(np.arange(VOCAB_SIZE), used_ids([tokens], [], VOCAB_SIZE))
    assert PAD_ID in unused and len(unused) > 100
    for gradient in gradients:
        assert (gradient[unused] == 0).all() and (gradient != 0).any()


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 200), st.lists(st.floats(0, 1e-2), max_size=30), st.floats(0, 0.5), st.integers(0, 1000)
)
def test_decay_equals_the_fused_kernel_bitwise(
    rows: int, rates: list[float], weight_decay: float, seed: int
) -> None:
    table = torch.randn(rows, 300, generator=torch.Generator().manual_seed(seed))
    parameter = torch.nn.Parameter(table.clone())
    optimizer = torch.optim.AdamW([parameter], lr=1.0, weight_decay=weight_decay, fused=True)
    for learning_rate in rates:
        optimizer.param_groups[0]["lr"] = learning_rate
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    decay(table, rates, weight_decay)
    assert torch.equal(table, parameter.detach())


def test_decay_is_not_one_multiplication() -> None:
    """Why the steps are replayed one by one."""
    table = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    once = table * (1 - 1e-3 * 0.01) ** 500
    decay(table, [1e-3] * 500, 0.01)
    torch.testing.assert_close(table, once, rtol=1e-4, atol=0)
    assert not torch.equal(table, once)


def test_decay_may_be_made_up_for_in_portions() -> None:
    whole = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    portions = whole.clone()
    rates = [rate(step) for step in range(STEPS)]
    decay(whole, rates, WEIGHT_DECAY)
    decay(portions, rates[:5], WEIGHT_DECAY)
    decay(portions, [0.0], WEIGHT_DECAY)
    decay(portions, rates[5:], WEIGHT_DECAY)
    assert torch.equal(whole, portions)


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 99), max_size=50),
    st.lists(st.integers(0, 99), max_size=50),
    st.lists(st.integers(0, 99), max_size=4),
)
def test_used_ids_are_what_occurs(first: list[int], second: list[int], extra: list[int]) -> None:
    def tokens(ids: list[int]) -> Tokens:
        one_row = np.array([0, len(ids)])
        return Tokens(np.array(ids, np.int32), one_row, np.array([1], np.uint16), np.array([False]))

    used = used_ids([tokens(first), tokens(second)], extra, 100)
    assert used.tolist() == sorted({*first, *second, *extra})
    back = used[remap(tokens(first), used, 100).ids]
    assert back.tolist() == first
    assert [compact_id(token_id, used) for token_id in used] == list(range(len(used)))


def test_remap_keeps_all_but_the_ids() -> None:
    tokens = random_tokens(1)
    mapped = remap(tokens, used_ids([tokens], [], VOCAB_SIZE), VOCAB_SIZE)
    assert mapped.ids.dtype == tokens.ids.dtype and mapped.ids.max() < VOCAB_SIZE // 2
    assert mapped.offsets is tokens.offsets and mapped.first_lengths is tokens.first_lengths
    assert mapped.truncated is tokens.truncated


def test_an_id_without_a_row_is_refused() -> None:
    tokens = random_tokens(1)
    used = used_ids([tokens], [], VOCAB_SIZE)
    lost = int(tokens.ids[0])
    with pytest.raises(ValueError, match=f"1 token ids .* {lost} the first"):
        remap(tokens, used[used != lost], VOCAB_SIZE)
    for absent in (0, VOCAB_SIZE - 1, VOCAB_SIZE + 9):
        with pytest.raises(ValueError, match=f"token id {absent} has no row"):
            compact_id(absent, used[used < VOCAB_SIZE - 1])


def test_compact_and_expand_are_inverse_and_copy() -> None:
    table = torch.nn.Parameter(torch.randn(30, 4, generator=torch.Generator().manual_seed(0)))
    used = np.array([0, 7, 29])
    small = compact(table, used)
    assert not small.requires_grad and torch.equal(small, table[[0, 7, 29]])
    small += 1
    wide = expand(table, small, used)
    assert not wide.requires_grad and torch.equal(wide[used], small)
    unused = np.setdiff1d(np.arange(30), used)
    assert torch.equal(wide[unused], table[unused]) and not torch.equal(table[used], small)
