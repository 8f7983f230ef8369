"""Rows taken out of data that is read: those rows, in that order, in each of their columns."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bertpair.data.dataset import Pairs, Split
from bertpair.data.tokenizer import Tokens, offsets_of

Row = tuple[list[int], int, bool]  # ids, how many are of the first text, whether it was cut
ROW = st.tuples(st.lists(st.integers(0, 9), max_size=5), st.integers(0, 2), st.booleans())


@st.composite
def rows_and_choice(draw: st.DrawFn) -> tuple[list[Row], list[int]]:
    """Rows of ids (some empty), and which to take: in any order, some twice, perhaps none."""
    rows = draw(st.lists(ROW, max_size=9))
    return rows, draw(st.lists(st.integers(0, len(rows) - 1), max_size=12)) if rows else []


def make_tokens(rows: list[Row]) -> Tokens:
    return Tokens(
        np.array([id_ for ids, _, _ in rows for id_ in ids], dtype=np.int32),
        offsets_of(np.array([len(ids) for ids, _, _ in rows], dtype=np.int64)),
        np.array([first for _, first, _ in rows], dtype=np.uint16),
        np.array([cut for _, _, cut in rows], dtype=np.bool_),
    )


def list_tokens(tokens: Tokens) -> list[Row]:
    bounds = zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)
    ids = [tokens.ids[start:end].tolist() for start, end in bounds]
    return list(zip(ids, tokens.first_lengths.tolist(), tokens.truncated.tolist(), strict=True))


def make_pairs(count: int, *, single: bool = False, labelled: bool = True) -> Pairs:
    places = np.arange(count, dtype=np.int32)
    return Pairs(
        [f"a{i}" for i in range(count)],
        None if single else [f"b{i}" for i in range(count)],
        [f"label {i}" for i in range(count)] if labelled else None,
        ("one.tsv", "two.tsv"),
        places % 2,
        places + 2,
        ("a", "b", "label"),
    )


@given(rows_and_choice())
def test_tokens_are_taken_whole(drawn: tuple[list[Row], list[int]]) -> None:
    rows, chosen = drawn
    tokens = make_tokens(rows)
    taken = tokens.take(np.array(chosen, dtype=np.int64))
    assert list_tokens(taken) == [rows[row] for row in chosen]
    assert taken.offsets[0] == 0 and taken.offsets[-1] == len(taken.ids) and len(taken) == len(chosen)
    for name in ("ids", "offsets", "first_lengths", "truncated"):
        assert getattr(taken, name).dtype == getattr(tokens, name).dtype, name
        assert not np.shares_memory(getattr(taken, name), getattr(tokens, name)), name
    assert list_tokens(tokens) == rows, "nothing is changed"


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("labelled", [False, True])
def test_pairs_are_taken_with_their_places(single: bool, labelled: bool) -> None:
    pairs = make_pairs(6, single=single, labelled=labelled)
    taken = pairs.take(np.array([5, 0, 0, 3]))
    assert len(taken) == 4 and taken.text_a == ["a5", "a0", "a0", "a3"]
    assert taken.text_b == (None if single else ["b5", "b0", "b0", "b3"])
    assert taken.labels == (["label 5", "label 0", "label 0", "label 3"] if labelled else None)
    assert list(map(taken.where, range(4))) == ["two.tsv:7", "one.tsv:2", "one.tsv:2", "two.tsv:5"]
    assert (taken.files, taken.header) == (pairs.files, pairs.header)


@pytest.mark.parametrize("targets", [np.arange(5), np.arange(5, dtype=np.float32) / 2, None])
def test_a_split_takes_the_same_rows_of_all_it_has(targets: np.ndarray | None) -> None:
    rows = [([i] * i, i, i % 2 == 0) for i in range(5)]
    split = Split(make_pairs(5), make_tokens(rows), targets)
    taken = split.take(np.array([4, 1]))
    assert len(taken) == len(taken.pairs) == 2
    assert taken.pairs.text_a == ["a4", "a1"] and list_tokens(taken.tokens) == [rows[4], rows[1]]
    if targets is None:
        assert taken.targets is None
    else:
        assert taken.targets is not None and taken.targets.dtype == targets.dtype
        assert taken.targets.tolist() == [targets[4], targets[1]]
