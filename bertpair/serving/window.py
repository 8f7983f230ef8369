"""Which waiting rows make up the next batch: the oldest, and those of like length among the next oldest."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

WINDOW_BATCHES = 2  # rows are sorted by length within the oldest rows that fill so many batches; more are
# hardly worth it, and every row that is passed over waits longer than it was admitted for
ROUND_UP = 8  # a row counts as a multiple of so many tokens: what it is padded to, or costs anyhow


def count_tokens(length: int) -> int:
    """A row of `length` tokens as budgets count it."""
    return -(-length // ROUND_UP) * ROUND_UP


def window_size(lengths: Iterable[int], max_batch_tokens: int) -> int:
    """How many of the oldest rows (their `lengths` in the order they came) are looked at; one at least."""
    totals = itertools.accumulate(lengths)
    limit = WINDOW_BATCHES * max_batch_tokens
    return max(1, sum(1 for _ in itertools.takewhile(lambda total: total <= limit, totals)))


def choose_batch(lengths: Sequence[int], max_batch_tokens: int) -> list[int]:
    """Positions in the window (oldest first) of the rows to run, by length; 0, the oldest, is among them."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    first, last = best_slice([lengths[i] for i in order], order.index(0), max_batch_tokens)
    return order[first : last + 1]


def best_slice(lengths: Sequence[int], must: int, max_tokens: int) -> tuple[int, int]:
    """First and last of the neighbours to run, `lengths` being sorted; `must` is always among them.

    Of the slices that hold `must` and whose longest × count is within `max_tokens`, the one with the most
    tokens that are no padding; `must` alone where none is.
    """
    totals = [0, *itertools.accumulate(lengths)]
    best, most = (must, must), 0
    for last in range(must, len(lengths)):
        first = max(0, last + 1 - max_tokens // max(1, lengths[last]))
        if first > must:
            break
        if totals[last + 1] - totals[first] > most:
            best, most = (first, last), totals[last + 1] - totals[first]
    return best
