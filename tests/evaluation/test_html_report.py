"""The page of an evaluation stays small, whatever the data."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from bertpair.data.dataset import Pairs, Split
from bertpair.data.tokenizer import Tokens, offsets_of
from bertpair.evaluation.html_report import evaluation_page
from bertpair.evaluation.measure import Evaluation, Scored, detail, measure, with_further
from bertpair.evaluation.page import render

SCRIPTS = "数据库索引", "مرحبا بالعالم", "<b>&amp;</b>", "слово"


def scored_rows(num_rows: int, labels: Sequence[str], characters: int) -> Scored:
    """Random answers for rows of long texts in groups of four, in several scripts and with markup."""
    rng = np.random.default_rng(16)
    texts = [(SCRIPTS[i % 4] * (characters // len(SCRIPTS[i % 4]) + 1))[:characters] for i in range(num_rows)]
    gold = rng.integers(0, len(labels), num_rows)
    places = np.zeros(num_rows, np.int32), np.arange(2, num_rows + 2, dtype=np.int32)
    groups = [f"q{i // 4}" for i in range(num_rows)]
    names = [labels[k] for k in gold]
    pairs = Pairs(texts, texts, names, ("dev.tsv",), *places, None, groups)
    lengths = rng.integers(3, 128, num_rows)
    halves = (lengths // 2).astype(np.int32)
    tokens = Tokens(
        np.zeros(lengths.sum(), np.int32), offsets_of(lengths), halves, np.zeros(num_rows, np.bool_)
    )
    logits = rng.normal(size=(num_rows, len(labels))).astype(np.float32)
    logits[np.arange(num_rows), gold] += 1
    split, evaluation = Split(pairs, tokens, gold), Evaluation(measure(logits, gold, labels), logits)
    details = with_further(detail(evaluation, split, labels, {"q1"}), evaluation, split, labels)
    return Scored("model", Path("m"), Path("m"), tuple(labels), evaluation, details, split)


@pytest.mark.parametrize("num_labels", [2, 20])
def test_the_page_does_not_grow_with_the_data(num_labels: int) -> None:
    labels = [f"{SCRIPTS[k % 4]}{k}" for k in range(num_labels)]
    sizes = []
    for num_rows in (2_000, 20_000):
        page = evaluation_page(scored_rows(num_rows, labels, 700), {}, [], {}, "python evaluate.py")
        sizes.append(len(render(page)))
    assert sizes[1] < 1.02 * sizes[0] and sizes[1] < 1_000_000, sizes


def test_texts_are_cut_and_only_the_worst_errors_are_shown() -> None:
    scored = scored_rows(2_000, ["a", "b"], 700)
    text = render(evaluation_page(scored, {}, [], {}, "python evaluate.py")).decode()
    assert SCRIPTS[0] * 99 in text and SCRIPTS[0] * 101 not in text
    wrong = int((scored.evaluation.chosen != scored.split.targets).sum())
    assert wrong > 200 and f"{wrong:,} of 2,000, most confident first: the first 200" in text
    assert text.count("dev.tsv:") == 200
