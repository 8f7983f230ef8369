"""Which rows make a batch: the oldest always, the budget kept, as little padding as the neighbours allow."""

from hypothesis import given
from hypothesis import strategies as st

from bertpair.serving.batcher import WINDOW_BATCHES, best_slice, choose_batch, count_tokens, window_size

LENGTHS = st.lists(st.integers(1, 512), min_size=1, max_size=60)


@given(LENGTHS, st.integers(1, 2000))
def test_the_oldest_is_in_the_batch_and_the_budget_holds(lengths: list[int], budget: int) -> None:
    chosen = choose_batch(lengths, budget)
    assert 0 in chosen and len(set(chosen)) == len(chosen)
    longest = max(lengths[i] for i in chosen)
    assert len(chosen) == 1 or longest * len(chosen) <= budget
    assert [lengths[i] for i in chosen] == sorted(lengths[i] for i in chosen)


@given(LENGTHS, st.integers(1, 2000), st.data())
def test_no_other_slice_has_more_tokens(lengths: list[int], budget: int, data: st.DataObject) -> None:
    ordered = sorted(lengths)
    must = data.draw(st.integers(0, len(lengths) - 1))
    first, last = best_slice(ordered, must, budget)
    found = sum(ordered[first : last + 1])
    for i in range(must + 1):
        for j in range(must, len(ordered)):
            if ordered[j] * (j - i + 1) <= budget:
                assert sum(ordered[i : j + 1]) <= found


def test_a_long_row_that_came_first_is_not_put_off() -> None:
    assert choose_batch([512, *[8] * 100], 256) == [0]
    assert choose_batch([8, *[512] * 3, *[8] * 5], 64) == [0, 4, 5, 6, 7, 8]


def test_the_window_is_bounded_by_tokens() -> None:
    assert window_size([100] * 50, 200) == WINDOW_BATCHES * 2
    assert window_size([5000, 1], 10) == 1
    assert [count_tokens(n) for n in (1, 8, 9)] == [8, 8, 16]
