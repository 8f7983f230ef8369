"""The embedded sample keeps its promises: sizes, labels, no leak from train to dev, no answer in one text."""

import runpy
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DATA = ROOT / "data"
measure = runpy.run_path(str(ROOT / "benchmarks" / "sample.py"))
TRAIN, DEV = (measure["read_rows"](DATA / name) for name in ("train.tsv", "dev.tsv"))


@pytest.mark.slow
def test_the_generator_writes_these_very_files(tmp_path: Path) -> None:
    runpy.run_path(str(DATA / "generate.py"))["generate"](tmp_path)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 4
    for path in written:
        assert path.read_bytes() == (DATA / path.relative_to(tmp_path)).read_bytes(), path.name


def test_the_rows_speak_of_two_hundred_concepts_and_more() -> None:
    glossary = [line.split("\t") for line in (DATA / "glossary.tsv").read_text(encoding="utf-8").splitlines()]
    texts = "\n".join(f"{row[1]}\n{row[2]}" for row in TRAIN).casefold()
    concepts = [row for row in glossary[1:] if row[0] != "-"]
    named = [row for row in concepts if row[1].casefold() in texts and row[5].split(" | ")[0] != ""]
    assert len(named) >= 200
    assert len({row[1] for row in concepts}) == len(concepts)


def test_sizes_and_labels() -> None:
    assert (len(TRAIN), len(DEV)) == (12_000, 1_500)
    for rows in (TRAIN, DEV):
        assert all(len(row) == 4 and row[1].strip() and row[2].strip() for row in rows)
        assert set(Counter(row[3] for row in rows)) == {"positive", "negative", "neutral"}
        assert measure["majority"](rows) <= 0.45


def test_punctuation_comes_in_both_widths() -> None:
    text = "".join(row[1] + row[2] for row in DEV)
    assert all(text.count(sign) > 50 for sign in (",", "\uff0c", "(", "\uff08", ".", "\u3002"))


def test_dev_pairs_are_new_and_a_quarter_of_the_given_answers_too() -> None:
    assert measure["num_leaked"](TRAIN, DEV) == 0
    assert measure["unseen_share"](TRAIN, DEV) >= 0.25
    assert measure["num_leaked"](DEV[:1] + TRAIN, DEV) == 1


@pytest.mark.slow
@pytest.mark.parametrize("column", [1, 2])
def test_no_text_alone_tells_the_label(column: int) -> None:
    """Character n-grams of one text stay within ten points of the majority class."""
    assert measure["one_text_accuracy"](TRAIN, DEV, column) <= measure["majority"](DEV) + 0.10


def test_overlap_and_lengths_do_not_tell_it_either() -> None:
    """Fifteen points under the 0.85 that the tiny model must reach."""
    assert measure["overlap_accuracy"](TRAIN, DEV) <= 0.70
