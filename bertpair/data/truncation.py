"""Longest-first truncation of pairs, and rows laid end to end: the arithmetic of token rows, in numpy."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def longest_first(first: Ints, second: Ints, room: int) -> list[Ints]:
    """How many tokens of each text stay: the longer one loses tokens until both fit or are equally long.

    An odd token more goes to the longer text, among equals to the second.
    """
    half = room // 2
    shorter = np.minimum(first, second)
    long = np.where(shorter <= half, room - shorter, room - half)
    short = np.minimum(shorter, half)
    is_cut, is_longer = first + second > room, first > second
    return [
        np.where(is_cut, np.where(is_longer, long, short), first),
        np.where(is_cut, np.where(is_longer, short, long), second),
    ]


def undecided_heads(
    is_cut: NDArray[np.bool_], counts: Ints, rows: Sequence[Ints], room: int
) -> NDArray[np.bool_]:
    """Which texts have to be tokenized whole: too few tokens, or open which text of some pair is the longer.

    `counts` are those of the heads where `is_cut`; `rows` has each column's text numbers, row by row.
    """
    undecided = counts <= room
    if len(rows) == 2:
        a, b = rows
        a_open = is_cut[a] & (is_cut[b] | (counts[b] >= counts[a]))
        b_open = is_cut[b] & (is_cut[a] | (counts[a] >= counts[b]))
        undecided[a[a_open]] = True
        undecided[b[b_open]] = True
    return undecided & is_cut


def offsets_of(lengths: Ints) -> Ints:
    """Where runs of these lengths begin when they stand end to end, and where the last one ends."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def copy_runs(
    target: NDArray[np.int32], to: Ints, source: NDArray[np.int32], start: Ints, length: Ints
) -> None:
    """`target[to[i] : to[i] + length[i]] = source[start[i] : start[i] + length[i]]` for all i at once."""
    within = np.arange(length.sum()) - np.repeat(offsets_of(length)[:-1], length)
    target[np.repeat(to, length) + within] = source[np.repeat(start, length) + within]
