"""`predict_iter`: `predict`, over rows that are read while they are answered."""

import itertools
import json
import tracemalloc
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import write_hf_folder
from safetensors.numpy import load_file, save_file

from bertpair import ConfigError, DataError, PairClassifier, Prediction
from bertpair.evaluation.rows import WINDOW_ROWS

WORDS = "the cat sat mat good bad food café 中文 数据库 hello, (x)".split()
RNG = np.random.default_rng(3)
A, B = ([" ".join(RNG.choice(WORDS, RNG.integers(1, 14))) for _ in range(25)] for _ in "ab")
PAIRS = list(zip(A, B, strict=True))


def open_model(folder: Path, *, takes_pairs: bool | None = True) -> PairClassifier:
    """A classifier whose folder says what it takes, unless that is None."""
    config = json.loads((folder / "config.json").read_text())
    if takes_pairs is not None:
        config["bertpair"] = {"takes_pairs": takes_pairs, "header": None}
    (folder / "config.json").write_text(json.dumps(config))
    return PairClassifier.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PairClassifier:
    return open_model(write_hf_folder(tmp_path_factory.mktemp("pairs") / "hf-tiny"))


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> PairClassifier:
    return open_model(write_hf_folder(tmp_path_factory.mktemp("single") / "hf-tiny"), takes_pairs=False)


@pytest.fixture
def unknown(hf_folder: Path) -> PairClassifier:
    """Its folder does not say what it takes."""
    return open_model(hf_folder, takes_pairs=None)


def assert_equal_answers(found: list[Prediction], expected: list[Prediction]) -> None:
    """Equal but for rounding: what a row rides with changes its logits by that."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one.label, one.truncated, one.num_tokens) == (other.label, other.truncated, other.num_tokens)
        assert one.score == pytest.approx(other.score, abs=1e-6)
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-6)


@pytest.mark.parametrize("window_rows", [1, 7, 24, 25, 26, WINDOW_ROWS])
def test_windows_of_any_size_answer_as_predict_does(model: PairClassifier, window_rows: int) -> None:
    expected = model.predict(PAIRS)
    found = list(model.predict_iter(iter(PAIRS), window_rows=window_rows))
    assert_equal_answers(found, expected)
    assert len({round(answer.score, 5) for answer in expected}) > 20  # else their order would not show
    if window_rows >= len(PAIRS):
        assert found == expected


FORMS: dict[str, Callable[[], object]] = {
    "list": lambda: PAIRS,
    "iterator": lambda: iter(PAIRS),
    "generator": lambda: (pair for pair in PAIRS),
    "zip": lambda: zip(A, B, strict=True),
    "mappings": lambda: ({"id": 1, "sentence1": a, "sentence2": b} for a, b in PAIRS),
    "values of a dict": lambda: dict(enumerate(PAIRS)).values(),
    "array": lambda: np.array(PAIRS),
    "columns": lambda: {"text_a": A, "text_b": iter(B)},
}


@pytest.mark.parametrize("form", FORMS)
def test_rows_in_every_form(model: PairClassifier, form: str) -> None:
    assert_equal_answers(list(model.predict_iter(FORMS[form](), window_rows=10)), model.predict(PAIRS))


def test_none_at_all(model: PairClassifier, unknown: PairClassifier) -> None:
    assert list(model.predict_iter(iter([]))) == [] == list(model.predict_iter([]))
    assert list(unknown.predict_iter(iter(()))) == [] and unknown.takes_pairs is None


def test_single_texts(single: PairClassifier) -> None:
    expected = single.predict(A)
    assert_equal_answers(list(single.predict_iter(iter(A), window_rows=4)), expected)
    assert_equal_answers(list(single.predict_iter((A[0], A[1]))), expected[:2])


def test_a_regression_model_gives_values(hf_folder: Path) -> None:
    weights = load_file(hf_folder / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        weights[name] = weights[name][:1].copy()
    save_file(weights, hf_folder / "model.safetensors", {"format": "pt"})
    config = json.loads((hf_folder / "config.json").read_text())
    one = {"num_labels": 1, "problem_type": "regression", "id2label": {"0": "v"}, "label2id": {"v": 0}}
    (hf_folder / "config.json").write_text(json.dumps(config | one))
    model = open_model(hf_folder)
    found = list(model.predict_iter(zip(A, B, strict=True), window_rows=6))
    assert_equal_answers(found, model.predict(PAIRS))
    assert {answer.label for answer in found} == {None} and len({answer.score for answer in found}) > 1


def test_no_row_beyond_the_window_is_read(model: PairClassifier) -> None:
    taken = 0

    def endless() -> Iterator[tuple[str, str]]:
        nonlocal taken
        for pair in itertools.cycle(PAIRS):
            taken += 1
            yield pair

    answers = model.predict_iter(endless(), window_rows=4)
    assert taken == 0
    for number in range(1, 11):
        next(answers)
        assert taken == (4 if number <= 4 else 8 if number <= 8 else 12)


class Row(dict[str, str]):
    """A row that a weak reference can watch."""


def test_one_window_is_held_at_most(model: PairClassifier) -> None:
    made, gone, most = 0, [], 0

    def rows() -> Iterator[Row]:
        nonlocal made, most
        for a, b in PAIRS * 4:
            made, row = made + 1, Row(text_a=a, text_b=b)
            weakref.finalize(row, gone.append, made)
            most = max(most, made - len(gone))
            yield row
            del row

    assert sum(1 for _ in model.predict_iter(rows(), window_rows=20)) == 100
    assert most == 20


def peak_bytes(ask: Callable[[], Iterable[Prediction]]) -> int:
    tracemalloc.start()
    try:
        for _ in ask():
            pass
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(model: PairClassifier) -> None:
    def rows(count: int) -> Iterator[tuple[str, str]]:
        return itertools.islice(itertools.cycle(PAIRS), count)

    some, many = (
        peak_bytes(lambda count=count: model.predict_iter(rows(count), window_rows=50))
        for count in (200, 2000)
    )
    assert many < 1.5 * some
    assert peak_bytes(lambda: model.predict(rows(2000))) > 5 * many


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (("a", None), "expected texts, found None (NoneType)"),
        ("a text", "this model takes pairs of texts, found single texts"),
        (
            {"text_a": "x"},
            "this model takes pairs of texts, found single texts; text_b is missing (found the keys text_a)",
        ),
        (("a", "b", "c"), "expected two texts, found ('a', 'b', 'c')"),
        (("a", "b\ud800"), "character 1 is '\\ud800', half of a surrogate pair"),
    ],
)
def test_a_fault_comes_with_its_window_and_names_its_row(
    model: PairClassifier, fault: object, said: str
) -> None:
    answers = model.predict_iter([*PAIRS[:23], fault, PAIRS[24]], window_rows=10)
    assert_equal_answers(list(itertools.islice(answers, 20)), model.predict(PAIRS[:20]))
    with pytest.raises(DataError) as caught:
        next(answers)
    assert str(caught.value) == f"pairs[23]: {said}"
    assert list(answers) == []  # no row is passed over


def test_two_texts_in_a_window_are_no_pair(model: PairClassifier) -> None:
    answers = model.predict_iter(iter([*PAIRS[:4], "the cat", "sat"]), window_rows=4)
    assert len(list(itertools.islice(answers, 4))) == 4
    with pytest.raises(DataError, match=r"^pairs\[4\]: this model takes pairs of texts, found single texts$"):
        next(answers)
    with pytest.raises(DataError, match=r"^pairs\[0\]: this model takes pairs of texts"):
        next(model.predict_iter(iter(("the cat", "sat"))))


def test_a_pair_is_none_for_a_model_of_single_texts(single: PairClassifier) -> None:
    answers = single.predict_iter(iter([*A[:5], PAIRS[5]]), window_rows=3)
    with pytest.raises(DataError, match=r"^pairs\[5\]: this model takes single texts, found pairs of texts$"):
        list(answers)


def test_the_first_window_settles_what_the_folder_does_not_say(unknown: PairClassifier) -> None:
    answers = unknown.predict_iter(iter([*PAIRS[:4], "the cat", PAIRS[5]]), window_rows=4)
    next(answers)
    assert unknown.takes_pairs is True
    with pytest.raises(DataError, match=r"^pairs\[4\]: this model takes pairs"):
        list(answers)


def test_within_the_first_window_the_first_row_does(unknown: PairClassifier) -> None:
    with pytest.raises(DataError, match=r"^pairs\[2\]: expected two texts like the first row, found 'x'"):
        next(unknown.predict_iter(iter([*PAIRS[:2], "x"])))


@pytest.mark.parametrize(
    "pair", [("the cat", "sat"), ["the cat", "sat"], {"text_a": "the cat", "text_b": "sat"}]
)
def test_one_pair_alone_is_one_pair(model: PairClassifier, pair: object) -> None:
    assert list(model.predict_iter(pair)) == model.predict([("the cat", "sat")])


def test_bad_arguments_are_told_at_the_call(model: PairClassifier) -> None:
    for window_rows in (0, -1):
        with pytest.raises(ConfigError, match=f"^window_rows: found {window_rows}; expected at least 1$"):
            model.predict_iter(iter(PAIRS), window_rows=window_rows)
    for no_rows in ("a text", 5, np.array("a text"), {"text_a": A}, {"text_a": A, "text_b": B[:2]}):
        with pytest.raises(DataError, match="^pairs: "):
            model.predict_iter(no_rows)  # type: ignore[arg-type]
