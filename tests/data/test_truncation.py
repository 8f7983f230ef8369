"""The arithmetic of token rows, against plain loops."""

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from bertpair.data.tokenizer import copy_runs, longest_first, offsets_of, undecided_heads

COUNTS = st.integers(0, 30)


def one_by_one(first: int, second: int, room: int) -> tuple[int, int]:
    """Drop tokens one by one from the longer text; of equals, the one that was longer before is spared."""
    keep = [first, second]
    spared = 0 if first > second else 1
    while sum(keep) > room:
        longer = 1 - spared if keep[0] == keep[1] else int(keep[1] > keep[0])
        keep[longer] -= 1
    return keep[0], keep[1]


@given(st.lists(st.tuples(COUNTS, COUNTS), min_size=1, max_size=20), st.integers(2, 40))
def test_longest_first_equals_dropping_one_by_one(pairs: list[tuple[int, int]], room: int) -> None:
    first, second = np.array(pairs).T
    kept = longest_first(first, second, room)
    assert list(zip(*(k.tolist() for k in kept), strict=True)) == [one_by_one(a, b, room) for a, b in pairs]


@example([(5, 5, True, False, 1, 0), (5, 5, False, True, 0, 1)], 3)
@given(st.lists(st.tuples(COUNTS, COUNTS, st.booleans(), st.booleans(), COUNTS, COUNTS)), st.integers(2, 20))
def test_heads_called_decided_decide_their_rows(
    pairs: list[tuple[int, int, bool, bool, int, int]], room: int
) -> None:
    """Whatever number of tokens follows a decided head, the row keeps the same ones and is cut alike."""
    counts = np.array([count for a, b, *_ in pairs for count in (a, b)], np.int64)
    is_cut = np.array([cut for _, _, *cuts, _, _ in pairs for cut in cuts], np.bool_)
    hidden = np.array([more for *_, a, b in pairs for more in (a, b)], np.int64)
    rows = [np.arange(0, len(counts), 2), np.arange(1, len(counts), 2)]
    undecided = undecided_heads(is_cut, counts, rows, room)
    assert not (undecided & ~is_cut).any()
    true = counts + hidden * is_cut
    seen = np.where(undecided, true, counts)
    for a, b in zip(*rows, strict=True):
        kept = longest_first(seen[[a]], seen[[b]], room)
        assert np.array_equal(kept, longest_first(true[[a]], true[[b]], room))
        assert (seen[a] + seen[b] > room) == (true[a] + true[b] > room)
    alone = undecided_heads(is_cut, counts, rows[:1], room)
    assert np.array_equal(alone, is_cut & (counts <= room))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 20)), max_size=12))
def test_copy_runs_equals_slices(runs: list[tuple[int, int]]) -> None:
    length = np.array([run[0] for run in runs], np.int64)
    start = np.array([run[1] for run in runs], np.int64)
    source = np.arange(100, 130, dtype=np.int32)
    to = offsets_of(length + 1)[:-1]
    target = np.full(int((length + 1).sum()), -1, np.int32)
    expected = target.copy()
    copy_runs(target, to, source, start, length)
    for at, (count, begin) in zip(to, runs, strict=True):
        expected[at : at + count] = source[begin : begin + count]
    assert np.array_equal(target, expected)


def test_offsets_begin_at_zero_and_end_at_the_total() -> None:
    assert offsets_of(np.array([2, 0, 3])).tolist() == [0, 2, 2, 5]
    assert offsets_of(np.zeros(0, np.int64)).tolist() == [0]
