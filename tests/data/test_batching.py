"""Every row once, slices that partition, padding against a loop, and positions that can be resumed."""

from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bertpair.data.batching import (
    Batch,
    BatchStream,
    epoch_batches,
    pad_batch,
    padded_lengths,
    slice_batch,
    token_budget_batches,
)
from bertpair.data.tokenizer import Tokens

LENGTHS = st.lists(st.integers(2, 70), min_size=1, max_size=300).map(lambda x: np.array(x, dtype=np.int64))
BATCH_SIZES = st.integers(1, 40)
GROUPED = st.booleans()


def random_tokens(generator: np.random.Generator, lengths: NDArray[np.int64]) -> Tokens:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Tokens(
        ids=generator.integers(1, 1000, offsets[-1]).astype(np.int32),
        offsets=offsets,
        first_lengths=generator.integers(1, lengths + 1).astype(np.uint16),
        truncated=np.zeros(len(lengths), dtype=np.bool_),
    )


@settings(deadline=None)
@given(LENGTHS, BATCH_SIZES, GROUPED, st.integers(0, 2**40), st.integers(0, 50))
def test_every_row_stands_in_an_epoch_exactly_once(
    lengths: NDArray[np.int64], batch_size: int, grouped: bool, seed: int, epoch: int
) -> None:
    batches = epoch_batches(lengths, batch_size, seed=seed, epoch=epoch, group_by_length=grouped)
    assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert 1 <= len(batches[-1]) <= batch_size


@pytest.mark.parametrize("grouped", [False, True])
def test_every_epoch_and_every_seed_has_an_order_of_its_own(grouped: bool) -> None:
    lengths = np.arange(200) % 17 + 5
    orders = {
        tuple(np.concatenate(epoch_batches(lengths, 8, seed=seed, epoch=epoch, group_by_length=grouped)))
        for seed in range(5)
        for epoch in range(20)
    }
    assert len(orders) == 100


@settings(deadline=None)
@given(LENGTHS, BATCH_SIZES, GROUPED)
def test_an_epoch_is_a_pure_function(lengths: NDArray[np.int64], batch_size: int, grouped: bool) -> None:
    def run() -> list[list[int]]:
        batches = epoch_batches(lengths, batch_size, seed=4, epoch=2, group_by_length=grouped)
        return [batch.tolist() for batch in batches]

    np.random.seed(1)
    torch.manual_seed(1)
    states = np.random.get_state()[1].copy(), torch.get_rng_state()  # type: ignore[union-attr]
    first = run()
    assert (np.random.get_state()[1] == states[0]).all()  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), states[1])
    np.random.seed(2)
    torch.manual_seed(2)
    assert run() == first


@pytest.mark.parametrize("grouped", [True, False])
def test_epochs_and_seeds_differ(grouped: bool) -> None:
    lengths = np.random.default_rng(0).integers(5, 60, 2000)

    def company(seed: int, epoch: int) -> set[frozenset[int]]:
        batches = epoch_batches(lengths, 16, seed=seed, epoch=epoch, group_by_length=grouped)
        return {frozenset(batch.tolist()) for batch in batches}

    assert not company(1, 0) & company(1, 1)
    assert not company(1, 0) & company(2, 0)
    assert not company(1, 2) & company(2, 1)


def test_an_ungrouped_epoch_is_a_plain_permutation() -> None:
    """It does not look at the lengths at all."""
    lengths = np.arange(100)
    one = epoch_batches(lengths, 7, seed=1, epoch=0, group_by_length=False)
    other = epoch_batches(lengths[::-1], 7, seed=1, epoch=0, group_by_length=False)
    assert np.array_equal(np.concatenate(one), np.concatenate(other))


def waste(batches: list[NDArray[np.int64]], lengths: NDArray[np.int64]) -> float:
    padded = sum(int(lengths[batch].max()) * len(batch) for batch in batches)
    return 1 - lengths.sum() / padded


def test_grouping_by_length_keeps_padding_low() -> None:
    lengths = np.random.default_rng(0).normal(30, 12, 5000).clip(6, 64).astype(np.int64)
    plain = epoch_batches(lengths, 16, seed=1, epoch=0, group_by_length=False)
    grouped = epoch_batches(lengths, 16, seed=1, epoch=0, group_by_length=True)
    assert waste(plain, lengths) > 0.3
    assert waste(grouped, lengths) < 0.04


def test_grouping_padded_lengths_costs_no_padding_and_parts_rows_of_one_length() -> None:
    rng = np.random.default_rng(0)
    lengths = np.repeat(rng.normal(30, 12, 2500).clip(6, 64).astype(np.int64), 2)  # 2n, 2n + 1: kin

    def measure(keys: NDArray[np.int64]) -> tuple[float, float]:
        batches = epoch_batches(keys, 16, seed=1, epoch=0, group_by_length=True)
        families = np.mean([len(batch) - len({row // 2 for row in batch.tolist()}) for batch in batches])
        return sum(len(batch) * float(padded[batch].max()) for batch in batches), float(families)

    padded = padded_lengths(lengths, 8, 64)
    exact_cost, exact_families = measure(lengths)
    cost, families = measure(padded)
    assert cost < 1.01 * exact_cost
    assert families < 0.4 * exact_families


def test_padded_lengths_are_those_of_the_batches() -> None:
    lengths = np.array([1, 7, 8, 9, 33, 40, 41])
    assert padded_lengths(lengths, 8).tolist() == [8, 8, 8, 16, 40, 40, 48]
    assert padded_lengths(lengths, 8, 38).tolist() == [8, 8, 8, 16, 38, 40, 41]  # never under the row itself


def test_grouped_batches_do_not_come_in_order_of_length() -> None:
    lengths = np.random.default_rng(0).integers(6, 60, 6400)
    batches = epoch_batches(lengths, 16, seed=1, epoch=0, group_by_length=True)
    means = np.array([lengths[batch].mean() for batch in batches])
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.2
    neighbours = np.abs(np.diff(means)).mean()
    assert neighbours > 0.5 * np.abs(means - np.random.default_rng(1).permutation(means)).mean()


def test_a_small_last_batch_is_not_the_longest_rows() -> None:
    lengths = np.arange(1, 1 + 16 * 20 + 3)
    lasts = [
        lengths[epoch_batches(lengths, 16, seed=1, epoch=epoch, group_by_length=True)[-1]].mean()
        for epoch in range(40)
    ]
    assert abs(np.mean(lasts) / lengths.mean() - 1) < 0.25


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 999), max_size=60).map(lambda x: np.array(x, dtype=np.int64)),
    st.integers(1, 9),
    st.integers(1, 20),
)
def test_slices_partition_the_batch(rows: NDArray[np.int64], world_size: int, micro: int) -> None:
    ranks = [
        slice_batch(rows, rank=rank, world_size=world_size, micro_batch_size=micro)
        for rank in range(world_size)
    ]
    assert sorted(x for rank in ranks for part in rank for x in part) == sorted(rows)
    assert all(1 <= len(part) <= micro for rank in ranks for part in rank)
    shares = [sum(map(len, rank)) for rank in ranks]
    assert max(shares) - min(shares) <= 1


def test_processes_get_rows_of_like_length() -> None:
    rows = np.arange(64)  # sorted by length, as in a grouped batch
    shares = [slice_batch(rows, rank=rank, world_size=4, micro_batch_size=8) for rank in range(4)]
    means = [np.concatenate(share).mean() for share in shares]
    assert max(means) - min(means) <= 3


def pad_with_loops(tokens: Tokens, rows: list[int], pad_id: int, width: int) -> tuple[list[list[int]], ...]:
    ids, types, mask = [], [], []
    for row in rows:
        own = tokens.ids[tokens.offsets[row] : tokens.offsets[row + 1]].tolist()
        first, rest = int(tokens.first_lengths[row]), width - len(own)
        ids.append(own + [pad_id] * rest)
        types.append([0] * first + [1] * (len(own) - first) + [0] * rest)
        mask.append([1] * len(own) + [0] * rest)
    return ids, types, mask


@settings(deadline=None)
@given(
    LENGTHS,
    st.integers(0, 2**32),
    st.data(),
    st.sampled_from([1, 4, 8, 16]),
    st.one_of(st.none(), st.integers(0, 9)),
)
def test_padding_equals_a_loop(
    lengths: NDArray[np.int64], seed: int, data: st.DataObject, multiple: int, slack: int | None
) -> None:
    tokens = random_tokens(np.random.default_rng(seed), lengths)
    rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=20))
    longest = max(lengths[row] for row in rows)
    width = next(width for width in range(200) if width % multiple == 0 and width >= longest)
    max_length = None if slack is None else int(lengths.max()) + slack
    width = width if max_length is None else min(width, max_length)
    batch = pad_batch(tokens, np.array(rows), pad_id=7, pad_to_multiple_of=multiple, max_length=max_length)
    ids, types, mask = pad_with_loops(tokens, rows, 7, width)
    assert batch.input_ids.tolist() == ids and batch.token_type_ids.tolist() == types
    assert batch.input_ids.dtype == batch.token_type_ids.dtype == torch.int64
    if all(lengths[row] == width for row in rows):
        assert batch.attention_mask is None
    else:
        assert batch.attention_mask is not None and batch.attention_mask.dtype == torch.bool
        assert batch.attention_mask.tolist() == mask
    assert batch.num_tokens == sum(lengths[row] for row in rows)
    assert batch.rows.tolist() == rows and batch.targets is None


@pytest.mark.parametrize("dtype, expected", [(np.int64, torch.int64), (np.float32, torch.float32)])
def test_a_batch_gets_its_rows_targets(dtype: type, expected: torch.dtype) -> None:
    tokens = random_tokens(np.random.default_rng(0), np.array([3, 4, 5]))
    batch = pad_batch(tokens, np.array([2, 0]), pad_id=0, targets=np.array([1, 2, 3], dtype=dtype))
    assert batch.targets is not None and batch.targets.dtype == expected and batch.targets.tolist() == [3, 1]


def test_padding_no_rows_gives_empty_tensors() -> None:
    tokens = random_tokens(np.random.default_rng(0), np.array([3]))
    batch = pad_batch(tokens, np.array([], dtype=np.int64), pad_id=0)
    assert batch.input_ids.shape == (0, 0) and batch.num_tokens == 0 and batch.attention_mask is None


def test_a_batch_on_the_cpu_is_not_copied() -> None:
    tokens = random_tokens(np.random.default_rng(0), np.array([3, 5]))
    batch = pad_batch(tokens, np.array([0, 1]), pad_id=0)
    assert batch.to(torch.device("cpu")) is batch


def test_a_batch_moves_whole() -> None:
    tokens = random_tokens(np.random.default_rng(0), np.array([3, 5]))
    batch = pad_batch(tokens, np.array([0, 1]), pad_id=0, targets=np.array([1, 0]))
    moved = batch.to(torch.device("meta"))
    assert isinstance(moved, Batch) and moved.num_tokens == 8 and moved.rows is batch.rows
    tensors = (moved.input_ids, moved.token_type_ids, moved.attention_mask, moved.targets)
    assert all(tensor is not None and tensor.device.type == "meta" for tensor in tensors)


@settings(deadline=None)
@given(LENGTHS, BATCH_SIZES, GROUPED, st.integers(0, 40), st.integers(0, 99))
def test_a_resumed_stream_equals_an_uninterrupted_one(
    lengths: NDArray[np.int64], batch_size: int, grouped: bool, stop: int, seed: int
) -> None:
    def stream() -> BatchStream:
        return BatchStream(lengths, batch_size, seed=seed, group_by_length=grouped)

    def listed(part: BatchStream, count: int) -> list[tuple[int, int, list[int]]]:
        return [(epoch, batch, rows.tolist()) for epoch, batch, rows in islice(part, count)]

    whole = listed(stream(), stop + 12)
    first = stream()
    assert listed(first, stop) == whole[:stop]
    resumed = stream()
    resumed.load_state_dict(first.state_dict())
    assert listed(resumed, 12) == whole[stop:]


def test_a_stream_is_the_epochs_in_order() -> None:
    lengths = np.random.default_rng(0).integers(2, 40, 50)
    stream = BatchStream(lengths, 8, seed=3, group_by_length=True)
    assert stream.num_batches == 7 and stream.position == (0, 0)
    for epoch in range(3):
        expected = epoch_batches(lengths, 8, seed=3, epoch=epoch, group_by_length=True)
        found = list(islice(stream, 7))
        assert [(e, b) for e, b, _ in found] == [(epoch, batch) for batch in range(7)]
        assert all(np.array_equal(x, y) for (_, _, x), y in zip(found, expected, strict=True))
    assert stream.state_dict() == {"epoch": 3, "batch": 0}


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_the_order_does_not_depend_on_the_world(world_size: int) -> None:
    """Whatever the number of processes, together they see the same rows at the same step."""
    lengths = np.random.default_rng(0).integers(2, 40, 70)
    alone = BatchStream(lengths, 24, seed=3)
    streams = [BatchStream(lengths, 24, seed=3) for _ in range(world_size)]
    for _, _, rows in islice(alone, 7):
        parts = [
            part
            for rank, stream in enumerate(streams)
            for part in slice_batch(next(stream)[2], rank=rank, world_size=world_size, micro_batch_size=4)
        ]
        assert sorted(np.concatenate(parts)) == sorted(rows)


@pytest.mark.parametrize("epoch, batch", [(0, 4), (-1, 0), (0, -1)])
def test_a_position_outside_the_data_is_refused(epoch: int, batch: int) -> None:
    stream = BatchStream(np.array([3] * 10), 3, seed=1)
    with pytest.raises(ValueError, match="an epoch has 4 batches"):
        stream.load_state_dict({"epoch": epoch, "batch": batch})


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 90), max_size=200).map(lambda x: np.array(x, dtype=np.int64)),
    st.integers(1, 600),
    st.sampled_from([1, 8]),
)
def test_scoring_batches_keep_to_the_budget(lengths: NDArray[np.int64], budget: int, multiple: int) -> None:
    batches = token_budget_batches(lengths, budget, multiple)
    assert sorted(x for batch in batches for x in batch) == list(range(len(lengths)))
    widths = [int(lengths[batch].max()) for batch in batches]
    assert widths == sorted(widths, reverse=True)
    for batch, width in zip(batches, widths, strict=True):
        padded = -(-width // multiple) * multiple
        assert len(batch) == 1 or len(batch) * padded <= budget
    for batch, width in zip(batches[:-1], widths, strict=False):  # and are as large as it allows
        assert (len(batch) + 1) * -(-width // multiple) * multiple > budget
