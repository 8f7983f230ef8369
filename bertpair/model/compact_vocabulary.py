"""Trains only the embedding rows that the data uses, with the same result.

Of mBERT's 119,547 word rows a data set uses a few thousand. The others get a gradient of zero: their moments
stay zero, Adam's term adds nothing, and all that a full training does to them is AdamW's decay, one
multiplication a step. So the table is trained with the rows in use alone, and the multiplications are made up
for when the whole table is wanted: one after the other, because each of them rounds.

The same result means: bitwise on a CPU with a hidden size that is a multiple of 16 (with another, the fused
AdamW rounds the last few values of a table in another way), as long as no step's gradients are clipped: the
norm that clipping divides by sums the table's gradient in another order. Else equal to rounding.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bertpair.data.tokenizer import Tokens
from bertpair.model.bert import BertClassifier

Ids = NDArray[np.int64]

logger = logging.getLogger(__name__)

BLOCK_VALUES = 2**15  # decayed for all steps at once: fits a cache, and is too small for torch to split


def used_ids(tokens_list: Iterable[Tokens], extra_ids: Sequence[int], vocab_size: int) -> Ids:
    """The ids that occur in any of the data sets, and `extra_ids` (padding at least), sorted."""
    is_used = np.zeros(vocab_size, dtype=np.bool_)
    is_used[list(extra_ids)] = True
    for tokens in tokens_list:
        is_used[tokens.ids] = True
    return np.flatnonzero(is_used)


def compact(table: Tensor, used: Ids) -> Tensor:
    """A copy of the used rows: (V, D) → (U, D)."""
    return table.detach()[torch.from_numpy(used).to(table.device)]


def compact_id(token_id: int, used: Ids) -> int:
    """The compact table's row for one id, the padding's for instance; ValueError if it has none."""
    row = int(np.searchsorted(used, token_id))
    if row == len(used) or used[row] != token_id:
        raise ValueError(f"token id {token_id} has no row in the compact table")
    return row


def remap(tokens: Tokens, used: Ids, vocab_size: int) -> Tokens:
    """The same rows with ids that count the compact table's rows; ValueError where one has no row there."""
    row_of = np.full(vocab_size, -1, dtype=np.int32)
    row_of[used] = np.arange(len(used), dtype=np.int32)
    ids = row_of[tokens.ids]
    if (ids < 0).any():
        missing = np.unique(tokens.ids[ids < 0])
        raise ValueError(f"{len(missing)} token ids have no row in the compact table, {missing[0]} the first")
    return replace(tokens, ids=ids)


@torch.no_grad()
def decay(table: Tensor, learning_rates: Sequence[float], weight_decay: float) -> None:
    """Do to `table`, in place, what AdamW's steps at these learning rates do to rows without a gradient.

    Leave out the rates of skipped steps (or give 0: a step at rate 0 changes nothing).
    """
    # Each factor is rounded to the table's type, as in AdamW's kernel; a factor of 1 changes nothing.
    factors = torch.tensor([1 - rate * weight_decay for rate in learning_rates], dtype=torch.float64)
    factors = factors.to(table.dtype)
    steps = factors[factors != 1].tolist()
    size = BLOCK_VALUES if table.device.type == "cpu" else table.numel()
    for block in torch.split(table.view(-1), size):
        for factor in steps:
            block.mul_(factor)


def expand(
    full: Tensor, trained: Tensor, used: Ids, learning_rates: Sequence[float] = (), weight_decay: float = 0.0
) -> Tensor:
    """The table (V, D) that a full training would have: `trained` in the used rows, `full` decayed elsewhere.

    `full` is the table as it was before the first of `learning_rates`, and is left alone. For a table of
    Adam's moments, `full` is zeros and there are no rates.
    """
    table = full.detach().clone(memory_format=torch.contiguous_format)
    decay(table, learning_rates, weight_decay)
    table[torch.from_numpy(used).to(table.device)] = trained.detach().to(table)
    return table


class CompactTable:
    """The whole word table (V, D) of a model that trains only the rows of `used`."""

    def __init__(self, full: Tensor, used: Ids) -> None:
        self.full = full.detach().cpu().clone()
        self.used = used

    def catch_up(self, learning_rates: Sequence[float], weight_decay: float) -> None:
        """Do to the unused rows what AdamW's steps at these rates do; none twice, no skipped one's."""
        decay(self.full, learning_rates, weight_decay)

    def whole(self, trained: Tensor) -> Tensor:
        """The table that a full training would have, given the rows that were trained."""
        return expand(self.full, trained.cpu(), self.used)

    def replace(self, full: Tensor) -> Tensor:
        """Take another table (V, D) for the whole one; returns its rows in use."""
        self.full = full.detach().cpu().clone()
        return compact(self.full, self.used)


def compact_model(model: BertClassifier, tokens_list: Sequence[Tokens], pad_id: int) -> CompactTable:
    """Leave `model` only the word rows that occur in the data; `remap` then counts ids accordingly."""
    words = model.embeddings.words
    used = used_ids(tokens_list, [pad_id], words.num_embeddings)
    table = CompactTable(words.weight, used)
    padding = None if words.padding_idx is None else compact_id(pad_id, used)
    model.embeddings.words = nn.Embedding.from_pretrained(  # type: ignore[no-untyped-call]
        compact(words.weight, used), freeze=False, padding_idx=padding
    )
    logger.info("compact vocabulary: %d of %d word rows are trained", len(used), words.num_embeddings)
    return table
