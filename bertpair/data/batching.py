"""Epochs of length-grouped batches, dynamic padding, and a position that can be saved and resumed.

Batches here are global: a pure function of seed, epoch, lengths and global batch size, from a generator of
its own. Processes and micro-batches only slice them, so the order of training knows neither their number nor
what else drew random numbers.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bertpair.data.tokenizer import Tokens

Rows = NDArray[np.int64]
Lengths = NDArray[np.integer[Any]]

POOL_BATCHES = 64  # rows are sorted by length within this many batches: more saves little padding
MIN_POOLS = 4  # small data: still so many pools, or long rows would meet the same company every epoch


def epoch_batches(
    lengths: Lengths, batch_size: int, *, seed: int, epoch: int, group_by_length: bool
) -> list[Rows]:
    """The global batches of one epoch: every row number exactly once, only the last batch may be smaller.

    With `group_by_length` a batch holds rows of like length, sorted; without it, a plain permutation.
    Give `padded_lengths`: rows whose lengths differ by less than the padding then mix at no cost. Told apart
    by single tokens, rows that share a text meet in one batch three times as often (benchmarks/LOG.md).
    """
    generator = np.random.Generator(np.random.PCG64([seed, epoch]))
    order: Rows = generator.permutation(len(lengths))
    num_full = len(order) // batch_size
    # The rest, a batch of its own, is cut off before sorting: it should not be the longest rows of a pool.
    full, rest = np.split(order, [num_full * batch_size])
    if group_by_length:
        pool = batch_size * max(1, min(POOL_BATCHES, num_full // MIN_POOLS))
        pools = [_sort_by_length(full[start : start + pool], lengths) for start in range(0, len(full), pool)]
        full, rest = np.concatenate([full[:0], *pools]), _sort_by_length(rest, lengths)
    batches = list(full.reshape(num_full, batch_size)[generator.permutation(num_full)])
    return [*batches, rest] if len(rest) else batches


def _sort_by_length(rows: Rows, lengths: Lengths) -> Rows:
    return rows[np.argsort(lengths[rows], kind="stable")]  # stable: rows of one length stay shuffled


def padded_lengths(lengths: Lengths, pad_to_multiple_of: int, max_length: int | None = None) -> Lengths:
    """What `pad_batch` would pad each row to if it were the longest of its batch."""
    rounded = -(-np.asarray(lengths, dtype=np.int64) // pad_to_multiple_of) * pad_to_multiple_of
    return rounded if max_length is None else np.maximum(lengths, np.minimum(rounded, max_length))


def fill_up(count: int, finest: int = 4) -> int:
    """The next of a few counts: steps of `finest` up to 64, then twice as large for twice the count."""
    step = max(finest, finest * 2 ** (count - 1).bit_length() // 64) if count > 1 else finest
    return -(-count // step) * step


def slice_batch(rows: Rows, *, rank: int, world_size: int, micro_batch_size: int) -> list[Rows]:
    """The micro-batches that process `rank` runs of one global batch: maybe unequal, maybe none at all.

    Every world_size-th row, so that all processes get rows of like length; together they get each row once.
    """
    own = rows[rank::world_size]
    return [own[start : start + micro_batch_size] for start in range(0, len(own), micro_batch_size)]


@dataclass(frozen=True)
class Batch:
    """Padded rows, ready for the model."""

    rows: Rows  # (B,) row numbers in the data
    input_ids: Tensor  # (B, L) int64
    token_type_ids: Tensor  # (B, L) int64
    attention_mask: Tensor | None  # (B, L) bool, True on tokens; None: nothing is padded
    targets: Tensor | None  # (B,)
    num_tokens: int  # without padding

    def to(self, device: torch.device) -> "Batch":
        """On `device`; the copy to a CUDA device runs beside the computation, from pinned memory."""
        if device.type == "cpu":
            return self
        is_cuda = device.type == "cuda"
        moved: dict[str, Any] = {
            name: (value.pin_memory() if is_cuda else value).to(device, non_blocking=is_cuda)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)


def pad_batch(
    tokens: Tokens,
    rows: Rows,
    *,
    pad_id: int,
    targets: NDArray[Any] | None = None,
    pad_to_multiple_of: int = 8,
    max_length: int | None = None,
) -> Batch:
    """Pad `rows` to the longest of them, rounded up to `pad_to_multiple_of` but not beyond `max_length`.

    `targets` are those of all the data; the batch gets its rows' share.
    """
    starts = tokens.offsets[rows]
    lengths = tokens.offsets[np.asarray(rows) + 1] - starts
    padded = int(padded_lengths(lengths, pad_to_multiple_of, max_length).max(initial=0))
    positions = np.arange(padded)
    is_token = positions < lengths[:, None]  # (B, L)
    input_ids = np.full(is_token.shape, pad_id, dtype=np.int64)
    input_ids[is_token] = tokens.ids[(starts[:, None] + positions)[is_token]]
    is_second = (positions >= tokens.first_lengths[rows][:, None]) & is_token
    return Batch(
        rows=rows,
        input_ids=torch.from_numpy(input_ids),
        token_type_ids=torch.from_numpy(is_second.astype(np.int64)),
        attention_mask=None if is_token.all() else torch.from_numpy(is_token),
        targets=None if targets is None else torch.from_numpy(targets[rows]),
        num_tokens=int(lengths.sum()),
    )


class BatchStream:
    """Global batches for ever, epoch after epoch: `next` gives (epoch, batch index, rows).

    `position` is (epoch, batch index) of the batch to come.
    """

    def __init__(self, lengths: Lengths, batch_size: int, *, seed: int, group_by_length: bool = True) -> None:
        self.num_batches = -(-len(lengths) // batch_size)  # of one epoch
        self.position = 0, 0
        self._draw = partial(epoch_batches, lengths, batch_size, seed=seed, group_by_length=group_by_length)
        self._drawn: tuple[int, list[Rows]] = -1, []

    def __iter__(self) -> Iterator[tuple[int, int, Rows]]:
        return self

    def __next__(self) -> tuple[int, int, Rows]:
        epoch, batch = self.position
        if epoch != self._drawn[0]:
            self._drawn = epoch, self._draw(epoch=epoch)
        self.position = (epoch + 1, 0) if batch + 1 == self.num_batches else (epoch, batch + 1)
        return epoch, batch, self._drawn[1][batch]

    def state_dict(self) -> dict[str, int]:
        return dict(zip(("epoch", "batch"), self.position, strict=True))

    def load_state_dict(self, state: dict[str, int]) -> None:
        """ValueError for a position that these data do not have."""
        epoch, batch = state["epoch"], state["batch"]
        if epoch < 0 or not 0 <= batch < self.num_batches:
            raise ValueError(f"position: found {state}; an epoch has {self.num_batches} batches")
        self.position = epoch, batch


def token_budget_batches(lengths: Lengths, max_tokens: int, pad_to_multiple_of: int) -> list[Rows]:
    """Batches for scoring, longest rows first: rows × padded length within `max_tokens`, or a single row."""
    order: Rows = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    padded = padded_lengths(lengths, pad_to_multiple_of)
    batches = []
    start = 0
    while start < len(order):
        end = start + max(1, max_tokens // max(1, int(padded[order[start]])))
        batches.append(order[start:end])
        start = end
    return batches
