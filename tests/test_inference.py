from pathlib import Path

import numpy as np
import pytest
import torch

from bertpair import CheckpointError, ConfigError, DataError, PairClassifier, StoppedError
from bertpair.inference import make_predictions, softmax
from bertpair.runtime import stop_flag
from bertpair.tokenizer import Tokens

WORDS = "the cat sat mat good bad food café 中文 数据库 [SEP] hello, (x)".split()


def random_pairs(count: int, seed: int = 0) -> list[tuple[str, str]]:
    rng = np.random.default_rng(seed)
    return [tuple(" ".join(rng.choice(WORDS, rng.integers(1, 14))) for _ in "ab") for _ in range(count)]


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
    (single,) = model.predict(["the cat"])
    assert single.num_tokens == 4 and not single.truncated


def test_truncation_is_told(hf_folder: Path) -> None:
    model = PairClassifier.from_pretrained(hf_folder, max_seq_length=8)
    short, long = model.predict([("the cat", "sat"), ("the cat " * 9, "sat")])
    assert (short.truncated, short.num_tokens) == (False, 6)
    assert (long.truncated, long.num_tokens) == (True, 8)


@pytest.mark.parametrize("pairs", ["a text", [("a", "b"), "c"], [("a",)], [("a", None)], ["a", ("b", "c")]])
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
