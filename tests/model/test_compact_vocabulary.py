"""Training on the rows in use against training on the whole table; the decay that unused rows get."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from bertpair.data.batching import epoch_batches, pad_batch
from bertpair.data.tokenizer import Tokens
from bertpair.model.bert import BertClassifier, BertConfig
from bertpair.model.compact_vocabulary import CompactTable, compact_model, decay
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


def train_both(
    max_grad_norm: float, skipped: frozenset[int] = frozenset()
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """All weights and the word table's moments, after training on the whole and on the compact table."""
    tokens, dev = random_tokens(1), random_tokens(2, low=5, high=300)
    whole = build()
    small = copy.deepcopy(whole)
    table = compact_model(small, [tokens, dev], PAD_ID)
    options = {"max_grad_norm": max_grad_norm, "skipped": skipped}
    one = train(whole, tokens, PAD_ID, **options)  # type: ignore[arg-type]
    other = train(small, table.remap(tokens), table.pad_id, **options)  # type: ignore[arg-type]
    table.catch_up([rate(step) for step in range(STEPS) if step not in skipped], WEIGHT_DECAY)
    expanded = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    expanded["embeddings.words.weight"] = table.whole(word_table(small))
    expected = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    for kind in ("exp_avg", "exp_avg_sq"):
        expected[kind] = one.state[word_table(whole)][kind]
        expanded[kind] = torch.zeros_like(expected[kind])
        expanded[kind][table.used] = other.state[word_table(small)][kind]
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
    unused = np.setdiff1d(np.arange(VOCAB_SIZE), tokens.ids)
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
    st.integers(0, 99),
)
def test_the_rows_in_use_are_those_that_occur(first: list[int], second: list[int], pad_id: int) -> None:
    def tokens(ids: list[int]) -> Tokens:
        one_row = np.array([0, len(ids)])
        return Tokens(np.array(ids, np.int32), one_row, np.array([1], np.uint16), np.array([False]))

    table = CompactTable(torch.zeros(100, 2), [tokens(first), tokens(second)], pad_id)
    assert table.used.tolist() == sorted({*first, *second, pad_id})
    assert table.used[table.remap(tokens(first)).ids].tolist() == first
    assert table.used[table.pad_id] == pad_id


def test_remap_keeps_all_but_the_ids() -> None:
    tokens = random_tokens(1)
    mapped = CompactTable(torch.zeros(VOCAB_SIZE, 2), [tokens], PAD_ID).remap(tokens)
    assert mapped.ids.dtype == tokens.ids.dtype and mapped.ids.max() < VOCAB_SIZE // 2
    assert mapped.offsets is tokens.offsets and mapped.first_lengths is tokens.first_lengths
    assert mapped.truncated is tokens.truncated


def test_an_id_without_a_row_is_refused() -> None:
    table = CompactTable(torch.zeros(VOCAB_SIZE, 2), [random_tokens(1)], PAD_ID)
    other = random_tokens(2)
    lost = np.setdiff1d(other.ids, table.used)
    with pytest.raises(ValueError, match=f"{len(lost)} token ids .* {lost[0]} the first"):
        table.remap(other)


def test_rows_and_whole_are_inverse_and_copy() -> None:
    parameter = torch.nn.Parameter(torch.randn(30, 4, generator=torch.Generator().manual_seed(0)))
    tokens = Tokens(
        np.array([7, 29], np.int32), np.array([0, 2]), np.array([1], np.uint16), np.array([False])
    )
    table = CompactTable(parameter, [tokens], 0)
    small = table.rows()
    assert not small.requires_grad and torch.equal(small, parameter[[0, 7, 29]])
    small += 1
    wide = table.whole(small)
    assert not wide.requires_grad and torch.equal(wide[table.used], small)
    unused = np.setdiff1d(np.arange(30), table.used)
    assert torch.equal(wide[unused], parameter[unused]) and torch.equal(table.full, parameter)
