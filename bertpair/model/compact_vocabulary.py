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
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from bertpair.data.tokenizer import Tokens
from bertpair.model.families import Network

logger = logging.getLogger(__name__)

BLOCK_VALUES = 2**15  # decayed for all steps at once: fits a cache, and is too small for torch to split


class CompactTable:
    """The whole word table (V, D) of a model that trains only the rows in use, those of `used`."""

    def __init__(self, full: Tensor, tokens_list: Sequence[Tokens], pad_id: int) -> None:
        is_used = np.zeros(len(full), dtype=np.bool_)
        is_used[pad_id] = True
        for tokens in tokens_list:
            is_used[tokens.ids] = True
        self.used = torch.from_numpy(np.flatnonzero(is_used))  # (U,), sorted
        self.pad_id = int(is_used[:pad_id].sum())  # the padding's row among them
        self.full = full.detach().cpu().clone()

    def rows(self) -> Tensor:
        """A copy of the rows in use, (U, D)."""
        return self.full[self.used]

    def remap(self, tokens: Tokens) -> Tokens:
        """The same rows with ids that count the rows in use; ValueError where one has no row there."""
        row_of = np.full(len(self.full), -1, dtype=np.int32)
        row_of[self.used.numpy()] = np.arange(len(self.used), dtype=np.int32)
        ids = row_of[tokens.ids]
        if (ids < 0).any():
            missing = np.unique(tokens.ids[ids < 0])
            raise ValueError(f"{len(missing)} token ids have no row in the table, {missing[0]} the first")
        return replace(tokens, ids=ids)

    def catch_up(self, learning_rates: Sequence[float], weight_decay: float) -> None:
        """Do to the unused rows what AdamW's steps at these rates do; none twice, no skipped one's."""
        decay(self.full, learning_rates, weight_decay)

    def whole(self, trained: Tensor) -> Tensor:
        """The table that a full training would have, given the rows that were trained: a copy."""
        table = self.full.clone()
        table[self.used] = trained.detach().to(table)
        return table


@torch.no_grad()
def decay(table: Tensor, learning_rates: Sequence[float], weight_decay: float) -> None:
    """Do to `table`, in place, what AdamW's steps at these learning rates do to rows without a gradient.

    Leave out the rates of skipped steps (or give 0: a step at rate 0 changes nothing).
    """
    # Each factor is rounded to the table's type, as in AdamW's kernel; a factor of 1 changes nothing.
    factors = torch.tensor([1 - rate * weight_decay for rate in learning_rates], dtype=torch.float64)
    factors = factors.to(table.dtype)
    steps = factors[factors != 1].tolist()
    for block in torch.split(table.view(-1), BLOCK_VALUES):
        for factor in steps:
            block.mul_(factor)


def compact_model(model: Network, tokens_list: Sequence[Tokens], pad_id: int) -> CompactTable:
    """Leave `model` only the word rows that occur in the data; `remap` then counts ids accordingly."""
    words = model.embeddings.words
    table = CompactTable(words.weight, tokens_list, pad_id)
    padding = None if words.padding_idx is None else table.pad_id
    model.embeddings.words = nn.Embedding.from_pretrained(  # type: ignore[no-untyped-call]
        table.rows(), freeze=False, padding_idx=padding
    )
    logger.info("compact vocabulary: %d of %d word rows are trained", len(table.used), words.num_embeddings)
    return table
