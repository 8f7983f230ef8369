import copy
import json
import multiprocessing
import os
import pickle
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_tiny_bert

from bertpair import CheckpointError, Config, ConfigError, DataError, PairClassifier, StoppedError, train
from bertpair.console import stop_flag
from bertpair.data.tokenizer import Tokens
from bertpair.evaluation.classifier import make_predictions
from bertpair.evaluation.scorer import softmax
from bertpair.model.bert import BertClassifier
from bertpair.runtime import allowed_precisions

WORDS = "the cat sat mat good bad food café 中文 数据库 [SEP] hello, (x)".split()


def random_pairs(count: int, seed: int = 0) -> list[tuple[str, str]]:
    rng = np.random.default_rng(seed)
    return [tuple(" ".join(rng.choice(WORDS, rng.integers(1, 14))) for _ in "ab") for _ in range(count)]


@pytest.mark.slow
def test_answers_come_in_the_order_given_whatever_they_ride_with(hf_folder: Path) -> None:
    model = PairClassifier.from_pretrained(hf_folder, max_batch_tokens=300)
    pairs = random_pairs(200)
    together = model.logits(pairs)
    alone = np.concatenate([model.logits([pair]) for pair in pairs])
    assert np.abs(together - alone).max() < 2e-6
    assert [p.label for p in model.predict(pairs)] == [model.labels[i] for i in alone.argmax(axis=1)]


def test_logits_equal_transformers(hf_folder: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    pairs = [(a.replace("[SEP]", "x"), b.replace("[SEP]", "y")) for a, b in random_pairs(30, seed=1)]
    reference = AutoModelForSequenceClassification.from_pretrained(hf_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(hf_folder)
    batch = tokenizer(
        [a for a, _ in pairs],
        [b for _, b in pairs],
        padding=True,
        truncation=True,
        max_length=64,
        return_tensors="pt",
    )
    with torch.no_grad():
        theirs = reference(**batch).logits.numpy()
    ours = PairClassifier.from_pretrained(hf_folder).logits(pairs)
    assert np.abs(ours - theirs).max() < 2e-6


def test_none_one_and_single_texts(hf_folder: Path) -> None:
    model = PairClassifier.from_pretrained(hf_folder)
    assert model.predict([]) == [] and model.logits([]).shape == (0, 3)
    (answer,) = model.predict([("the cat", "sat")])
    assert list(answer.probabilities) == ["negative", "neutral", "positive"] == list(model.labels or ())
    assert sum(answer.probabilities.values()) == pytest.approx(1) and answer.num_tokens == 6
    assert answer.score == max(answer.probabilities.values()) == answer.probabilities[answer.label or ""]
    (single,) = PairClassifier.from_pretrained(hf_folder).predict(["the cat"])
    assert single.num_tokens == 4 and not single.truncated


def named(folder: Path, takes_pairs: bool) -> PairClassifier:
    """A classifier whose folder says what it takes."""
    config = json.loads((folder / "config.json").read_text())
    config["bertpair"] = {"takes_pairs": takes_pairs, "header": None}
    (folder / "config.json").write_text(json.dumps(config))
    return PairClassifier.from_pretrained(folder)


class Frame:
    """What is asked of a data frame."""

    def __init__(self, **columns: list[object]) -> None:
        self.columns, self._columns = list(columns), columns

    def __getitem__(self, name: str) -> list[object]:
        return self._columns[name]


A, B = ["the cat", "good food", "sat"], ["a mat", "bad", "中文 the"]
ROWS = [list(row) for row in zip(A, B, strict=True)]


@pytest.mark.parametrize(
    "rows",
    [
        ROWS,
        zip(A, B, strict=True),
        (row for row in ROWS),
        np.array(ROWS),
        np.array(ROWS, dtype=object),
        [np.array(row) for row in ROWS],
        [{"text_a": a, "text_b": b} for a, b in ROWS],
        [{"index": 1, "sentence1": a, "sentence2": b} for a, b in ROWS],
        Frame(index=[1, 2, 3], text_a=A, text_b=B),
        Frame(question=A, answer=B),
        {"text_a": A, "text_b": B},
        {"index": [1, 2, 3], "sentence1": np.array(A), "sentence2": tuple(B)},
        {"question": A, "answer": iter(B)},
    ],
)
def test_pairs_in_every_form(hf_folder: Path, rows: object) -> None:
    model = named(hf_folder, takes_pairs=True)
    assert np.array_equal(model.logits(rows), model.logits(ROWS))


def test_single_texts_in_every_form(hf_folder: Path) -> None:
    model = named(hf_folder, takes_pairs=False)
    expected = model.logits(A)
    assert [p.num_tokens for p in model.predict(A)] == [4, 4, 3]
    forms = (tuple(A), iter(A), np.array(A), [{"text_a": a} for a in A], Frame(text_a=A), Frame(question=A))
    forms = (*forms, {"text_a": A}, {"question": A}, {"text_a": A, "text_b": None})
    for rows in forms:
        assert np.array_equal(model.logits(rows), expected)
    assert len(model.predict((A[0], A[1]))) == 2


@pytest.mark.parametrize(
    "pair", [("the cat", "sat"), ["the cat", "sat"], {"text_a": "the cat", "text_b": "sat"}]
)
def test_one_pair_alone_is_one_pair(hf_folder: Path, pair: object) -> None:
    model = named(hf_folder, takes_pairs=True)
    assert model.predict(pair) == model.predict([("the cat", "sat")])


def test_a_model_takes_what_it_was_trained_on(hf_folder: Path) -> None:
    model = named(hf_folder, takes_pairs=True)
    for rows in (A, ["only one"], np.array(A), [{"text_a": "x"}], Frame(text_a=A)):
        with pytest.raises(DataError, match="takes pairs of texts, found single texts"):
            model.predict(rows)
    with pytest.raises(DataError, match="takes single texts, found pairs of texts"):
        named(hf_folder, takes_pairs=False).predict(ROWS)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [{"text_a": "x"}],
            "pairs[0]: this model takes pairs of texts, found single texts; text_b is missing",
        ),
        ([{"text_a": "x", "text_b": "y"}, {"text_a": "x", "textb": "y"}], "pairs[1]: this model takes pairs"),
        ([{"id": 3, "sentence1": "x"}], "sentence2 is missing (found the keys id, sentence1)"),
        ([{"text_a": "x", "text_b": None}], "pairs[0]: this model takes pairs of texts"),
        ({"text_a": "x"}, "text_b is missing (found the keys text_a)"),
        ([{"text_b": "y"}], "pairs[0]: found the keys text_b; expected text_a and text_b, or"),
        ({"text_a": A}, "pairs: this model takes pairs of texts, found single texts; text_b is missing"),
        (Frame(id=A, text_a=A), "text_b is missing (found the columns id, text_a)"),
        ({"text_a": A, "text_b": None}, "text_b is missing"),
        ({"text_a": A, "text_b": B[:2]}, "equally many rows; text_a has 3, text_b has 2"),
        ({"text_a": A, "text_b": 5}, "pairs: expected one column text_b with a text for each row"),
        (
            {"text_a": A, "text_b": "y"},
            "pairs[0]: expected texts, found ['the cat', 'good food', 'sat'] (list)",
        ),
        ({"text_a": "x", "text_b": B}, "pairs[0]: expected texts, found ['a mat', 'bad', '中文 the'] (list)"),
        ({"text_a": [1, 2], "text_b": ["x", "y"]}, "pairs[0]: expected texts, found 1 (int)"),
        (
            {"q": A, "a": B, "id": A},
            "pairs: found a table with the columns q, a, id; expected text_a and text_b",
        ),
        ({}, "pairs[0]: found the keys none; expected text_a"),
    ],
)
def test_what_is_missing_in_a_mapping_is_named(hf_folder: Path, rows: object, said: str) -> None:
    model = named(hf_folder, takes_pairs=True)
    for ask in (model.predict, model.logits):
        with pytest.raises(DataError) as caught:
            ask(rows)
        assert said in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_where_the_folder_does_not_say_the_first_use_settles_it(
    hf_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "bertpair")
    model = PairClassifier.from_pretrained(hf_folder)
    assert len(model.predict(("the cat", "sat"))) == 1 and "pairs of texts" in caplog.text
    with pytest.raises(DataError):
        model.predict(A)
    assert len(PairClassifier.from_pretrained(hf_folder).predict(["the cat", "sat"])) == 2


def test_truncation_is_told(hf_folder: Path) -> None:
    model = PairClassifier.from_pretrained(hf_folder, max_seq_length=8)
    short, long = model.predict([("the cat", "sat"), ("the cat " * 9, "sat")])
    assert (short.truncated, short.num_tokens) == (False, 6)
    assert (long.truncated, long.num_tokens) == (True, 8)


@pytest.mark.parametrize(
    "pairs", ["a text", np.array("a text"), [("a", "b"), "c"], [("a",)], [("a", None)], ["a", ("b", "c")]]
)
def test_what_is_no_pair_is_named(hf_folder: Path, pairs: object) -> None:
    with pytest.raises(DataError, match="pairs"):
        PairClassifier.from_pretrained(hf_folder).predict(pairs)  # type: ignore[arg-type]


def test_bad_arguments(hf_folder: Path, tiny_config_folder: Path) -> None:
    with pytest.raises(ConfigError, match="64 positions"):
        PairClassifier.from_pretrained(hf_folder, max_seq_length=65)
    with pytest.raises(ConfigError, match="device"):
        PairClassifier.from_pretrained(hf_folder, device="cuda:99")
    with pytest.raises(CheckpointError, match="weights"):
        PairClassifier.from_pretrained(tiny_config_folder)


def test_a_device_too_small_for_the_model_is_one_line(
    hf_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of it")

    with monkeypatch.context() as patched, pytest.raises(ConfigError) as caught:
        patched.setattr(BertClassifier, "to", full)
        PairClassifier.from_pretrained(hf_folder)
    said = "out of memory: cpu has no room for the model (CUDA out of memory. Tried to allocate 2.00 GiB.);"
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)
    with (
        monkeypatch.context() as patched,
        pytest.raises(ConfigError, match="cpu has no room for the model .MemoryError.;"),
    ):
        patched.setattr("bertpair.evaluation.classifier.load_model", raise_memory_error)
        PairClassifier.from_pretrained(hf_folder)
    with monkeypatch.context() as patched, pytest.raises(ConfigError, match="cuda:0 has no room"):
        patched.setattr(torch.cuda, "device", full)
        allowed_precisions(torch.device("cuda:0"))
    assert PairClassifier.from_pretrained(hf_folder).predict([("a", "b")])


def raise_memory_error(*given: object, **named: object) -> None:
    raise MemoryError


def test_a_stop_leaves_the_models_mode(hf_folder: Path) -> None:
    model = PairClassifier.from_pretrained(hf_folder)
    model.scorer.model.train()
    stop_flag.request(15)
    try:
        with pytest.raises(StoppedError):
            model.scorer.logits(model.tokenizer.encode(["a"], ["b"], 16))
    finally:
        stop_flag.clear()
    assert model.scorer.model.training
    for mode in (True, False):
        model.scorer.model.train(mode)
        model.predict([("a", "b")])
        assert model.scorer.model.training is mode


def test_softmax_and_predictions_of_extreme_logits() -> None:
    logits = np.array([[1e4, -1e4, 0], [-1e4, -1e4, -1e4]], dtype=np.float32)
    assert np.allclose(softmax(logits), [[1, 0, 0], [1 / 3] * 3])
    tokens = Tokens(
        np.zeros(5, np.int32), np.array([0, 2, 5]), np.array([2, 3], np.uint16), np.array([False, True])
    )
    first, second = make_predictions(logits, tokens, ["a", "b", "c"])
    assert first.label == "a" and first.num_tokens == 2 and second.truncated
    value = make_predictions(np.array([[0.5], [-2.0]], np.float32), tokens, None)
    assert [p.score for p in value] == [0.5, -2.0] and value[0].label is None


TYPED = [("a [SEP] b", "c"), ("the cat", "[CLS] sat 中文")]


@pytest.mark.parametrize("settings", [{}, {"optimize": False}, {"amp": "bf16"}, {"engine": "openvino"}])
def test_copies_and_pickles_answer_alike(hf_folder: Path, settings: dict[str, object]) -> None:
    model = PairClassifier.from_pretrained(hf_folder, **settings)
    expected = model.logits(TYPED)
    for other in (copy.copy(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert np.array_equal(other.logits(TYPED), expected)
        assert other.tokenizer.backend.to_str() == model.tokenizer.backend.to_str()
        tokens, same = (each.tokenizer.encode(["[SEP] [PAD]"], None, 20) for each in (model, other))
        assert np.array_equal(tokens.ids, same.ids)


def answer(model: PairClassifier) -> list[list[float]]:
    return model.logits(TYPED).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_other_processes_answer_alike(hf_folder: Path, method: str) -> None:
    model = PairClassifier.from_pretrained(hf_folder)
    with multiprocessing.get_context(method).Pool(1) as pool:
        found = pool.apply_async(answer, (model,)).get(60)
    assert np.allclose(found, model.logits(TYPED), atol=2e-6)


@pytest.mark.slow
def test_a_child_forked_after_use_answers(tmp_path: Path) -> None:
    wide = write_tiny_bert(tmp_path / "wide", hidden_size=256, intermediate_size=1024)
    train_file = tmp_path / "train.tsv"
    train_file.write_text("i\ta\tb\tl\n" + "0\tcat\tsat\tx\n1\tmat\tgood\ty\n" * 8)
    train(
        Config(
            model_name_or_path=str(wide),
            from_scratch=True,
            train_file=[str(train_file)],
            max_steps=1,
            max_seq_length=24,
            output_dir=str(tmp_path / "out"),
            amp="off",
            num_threads=2,
        )
    )
    model = PairClassifier.from_pretrained(tmp_path / "out")
    pairs = [("the cat sat on the mat", "good")] * 64
    expected = model.logits(pairs)
    child = os.fork()
    if child == 0:
        os._exit(0 if np.allclose(model.logits(pairs), expected, atol=1e-5) else 3)
    end = time.monotonic() + 30
    while (found := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < end:
        time.sleep(0.02)
    if found[0] == 0:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert found == (child, 0)
