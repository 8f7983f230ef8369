"""Which rows make a batch: the oldest always, the budget kept, as little padding as the neighbours allow."""

from hypothesis import given
from hypothesis import strategies as st

from bertpair.serving.batcher import WINDOW_BATCHES, choose_batch, window_size

LENGTHS = st.lists(st.integers(1, 512), min_size=1, max_size=60)


@given(LENGTHS, st.integers(1, 2000))
def test_the_oldest_is_in_the_batch_and_the_budget_holds(lengths: list[int], budget: int) -> None:
    chosen = choose_batch(lengths, budget)
    assert 0 in chosen and len(set(chosen)) == len(chosen)
    longest = max(lengths[i] for i in chosen)
    assert len(chosen) == 1 or longest * len(chosen) <= budget
    assert [lengths[i] for i in chosen] == sorted(lengths[i] for i in chosen)


@given(LENGTHS, st.integers(1, 2000))
def test_no_other_neighbours_have_more_tokens(lengths: list[int], budget: int) -> None:
    found = sum(lengths[i] for i in choose_batch(lengths, budget))
    ordered = sorted(lengths)
    oldest = ordered.index(lengths[0])
    for i in range(oldest + 1):
        for j in range(oldest, len(ordered)):
            if ordered[j] * (j - i + 1) <= budget:
                assert sum(ordered[i : j + 1]) <= found


def test_a_long_row_that_came_first_is_not_put_off() -> None:
    assert choose_batch([512, *[8] * 100], 256) == [0]
    assert choose_batch([8, *[512] * 3, *[8] * 5], 64) == [0, 4, 5, 6, 7, 8]


def test_the_window_is_bounded_by_tokens() -> None:
    assert window_size([100] * 50, 200) == WINDOW_BATCHES * 2
    assert window_size([5000, 1], 10) == 1
