"""What the embedded sample gives away without reading pairs: leaks, one text alone, overlap and lengths.

    python benchmarks/sample.py [DATA_DIR]

Needs scikit-learn. tests/data/test_sample.py holds the same measures. The one-text figures of the program
itself take `python train.py`; data/README.md has the commands.
"""

import re
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

Row = list[str]  # index, reference answer, given answer, label
REFERENCE, GIVEN, LABEL = 1, 2, 3


def main(data_dir: Path) -> None:
    train, dev = read_rows(data_dir / "train.tsv"), read_rows(data_dir / "dev.tsv")
    print(f"rows: {len(train)} train, {len(dev)} dev")
    print(f"majority class of dev: {majority(dev):.4f}")
    print(f"dev pairs in train, folded: {num_leaked(train, dev)}")
    print(f"given answers of dev that never occur in train: {unseen_share(train, dev):.4f}")
    print(f"n-gram regression on the reference alone: {one_text_accuracy(train, dev, REFERENCE):.4f}")
    print(f"n-gram regression on the given answer alone: {one_text_accuracy(train, dev, GIVEN):.4f}")
    print(f"regression on character overlap and lengths: {overlap_accuracy(train, dev):.4f}")


def read_rows(path: Path) -> list[Row]:
    return [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:]]


def fold(text: str) -> str:
    """Case, width, spaces and punctuation do not count."""
    return re.sub(r"[\W_]", "", unicodedata.normalize("NFKC", text).casefold())


def majority(rows: list[Row]) -> float:
    return max(Counter(row[LABEL] for row in rows).values()) / len(rows)


def num_leaked(train: list[Row], dev: list[Row]) -> int:
    seen = {(fold(row[REFERENCE]), fold(row[GIVEN])) for row in train}
    return sum((fold(row[REFERENCE]), fold(row[GIVEN])) in seen for row in dev)


def unseen_share(train: list[Row], dev: list[Row]) -> float:
    seen = {row[GIVEN] for row in train}
    return sum(row[GIVEN] not in seen for row in dev) / len(dev)


def one_text_accuracy(train: list[Row], dev: list[Row], column: int) -> float:
    grams = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 3), sublinear_tf=True)
    model = LogisticRegression(max_iter=200)
    model.fit(grams.fit_transform([row[column] for row in train]), [row[LABEL] for row in train])
    return float(model.score(grams.transform([row[column] for row in dev]), [row[LABEL] for row in dev]))


def overlap_accuracy(train: list[Row], dev: list[Row]) -> float:
    model = LogisticRegression(max_iter=2000)
    model.fit(overlap_features(train), [row[LABEL] for row in train])
    return float(model.score(overlap_features(dev), [row[LABEL] for row in dev]))


def overlap_features(rows: list[Row]) -> NDArray[np.float64]:
    """Shared characters and pairs of characters by each text and by both, and the lengths: (rows, 10)."""
    features = []
    for row in rows:
        texts = fold(row[REFERENCE]), fold(row[GIVEN])
        line = [len(text) / 20 for text in (*texts, row[REFERENCE], row[GIVEN])]
        for size in (1, 2):
            a, b = ({text[i : i + size] for i in range(len(text) - size + 1)} for text in texts)
            line += [len(a & b) / max(1, len(part)) for part in (a | b, a, b)]
        features.append(line)
    return np.array(features)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent / "data")
