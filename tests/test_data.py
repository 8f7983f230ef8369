"""The embedded sample keeps its promises: sizes, labels, no leak from train to dev, no answer in one text."""

import re
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

DATA = Path(__file__).parent.parent / "data"
Row = list[str]


def read(name: str) -> list[Row]:
    lines = (DATA / name).read_text(encoding="utf-8").splitlines()
    assert lines[0] == "index\tsentence1\tsentence2\tlabel"
    return [line.split("\t") for line in lines[1:]]


def fold(text: str) -> str:
    """Case, width and punctuation do not count."""
    return re.sub(r"[\W_]", "", unicodedata.normalize("NFKC", text).casefold())


TRAIN, DEV = read("train.tsv"), read("dev.tsv")


def test_sizes_and_labels() -> None:
    assert (len(TRAIN), len(DEV)) == (12_000, 1_500)
    for rows in (TRAIN, DEV):
        assert all(len(row) == 4 and row[1].strip() and row[2].strip() for row in rows)
        counts = Counter(row[3] for row in rows)
        assert set(counts) == {"positive", "negative", "neutral"}
        assert max(counts.values()) <= 0.45 * len(rows)


def test_dev_pairs_are_new_and_a_quarter_of_the_given_answers_too() -> None:
    seen = {(fold(row[1]), fold(row[2])) for row in TRAIN}
    assert not [row for row in DEV if (fold(row[1]), fold(row[2])) in seen]
    answers = {row[2] for row in TRAIN}
    assert sum(row[2] not in answers for row in DEV) >= 0.25 * len(DEV)


def test_no_text_alone_tells_the_label() -> None:
    """Character n-grams of one text stay within ten points of the majority class."""
    gold = [row[3] for row in DEV]
    majority = max(Counter(gold).values()) / len(gold)
    for column in (1, 2):
        grams = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 3), sublinear_tf=True)
        model = LogisticRegression(max_iter=200)
        model.fit(grams.fit_transform([row[column] for row in TRAIN]), [row[3] for row in TRAIN])
        assert model.score(grams.transform([row[column] for row in DEV]), gold) <= majority + 0.10


def test_overlap_and_lengths_do_not_tell_it_either() -> None:
    """Fifteen points under the 0.85 that the tiny model must reach."""

    def features(row: Row) -> list[float]:
        a, b = fold(row[1]), fold(row[2])
        shared = len(set(a) & set(b))
        overlap = [shared / len(set(a + b)), shared / len(set(b)), shared / len(set(a))]
        return [*overlap, len(a) / 20, len(b) / 20]

    model = LogisticRegression(max_iter=1000)
    model.fit(np.array([features(row) for row in TRAIN]), [row[3] for row in TRAIN])
    assert model.score(np.array([features(row) for row in DEV]), [row[3] for row in DEV]) <= 0.70
