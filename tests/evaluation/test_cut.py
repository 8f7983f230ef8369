"""Texts are cut where training cut them: by the library, evaluate.py and the service.

Expected are transformers' answers to the same texts, cut by its tokenizer at the length of the training.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_hf_folder
from live_server import make_predictor, serving
from safetensors.torch import load_file, save_file

from bertpair import Config, PairClassifier, evaluate, train

ROOT = Path(__file__).parents[2]
CUT = 12
WHOLE = ("the cat sat hello good mat food", "good food bad service café cat")
PAIRS = [  # nine tokens of text are left at this cut, of either text five at most
    WHOLE,
    ("the cat sat hello good 中文 bad the", "good food bad service café мир hello"),  # another end
    ("the cat bad hello good mat food", "good food bad service café cat"),  # another third word
    ("the cat", "sat"),
]
TRUNCATED = [True, True, True, False]
NUM_TOKENS = [12, 12, 12, 6]

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_process")]


@pytest.fixture(scope="module", params=["only_second"])
def trained(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A run of two steps at CUT."""
    place = tmp_path_factory.mktemp("cut")
    rows = "".join(
        f"{i}\t{WHOLE[0]}\t{WHOLE[1]}\t{label}\n"
        for i, label in enumerate(["positive", "negative", "neutral"])
    )
    (place / "train.tsv").write_text("index\tsentence1\tsentence2\tlabel\n" + rows, encoding="utf-8")
    hf = write_hf_folder(place / "hf")
    weights = load_file(hf / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith("LayerNorm.weight"):
            weight.fill_(1)  # a word more or less then shows in the probabilities
    save_file(weights, hf / "model.safetensors", {"format": "pt"})
    train(
        Config(
            train_file=[str(place / "train.tsv")],
            model_name_or_path=str(hf),
            output_dir=str(place / "model"),
            max_seq_length=CUT,
            truncation=request.param,
            max_steps=2,
            eval_strategy="no",
            amp="off",
            num_threads=1,
        )
    )
    return place / "model"


@pytest.fixture(params=["with its settings", "as a foreign folder"])
def folder(trained: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """As training wrote it, or with Hugging Face's files alone."""
    copy = tmp_path / "model"
    shutil.copytree(trained, copy)
    if request.param == "as a foreign folder":
        for name in ("training_args.yaml", "manifest.json", "trainer_state.json", ".run.json"):
            (copy / name).unlink()
    return copy


@pytest.fixture
def expected(folder: Path) -> list[list[float]]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    how = tokenizer.init_kwargs["truncation"]
    # A first text that leaves no room for the second is cut too; transformers refuses such a pair.
    cuts = [how if i != 1 else True for i in range(len(PAIRS))]
    rows = [tokenizer(*pair, truncation=cut, max_length=CUT) for pair, cut in zip(PAIRS, cuts, strict=True)]
    batch = tokenizer.pad(rows, return_tensors="pt")
    assert batch["attention_mask"].sum(1).tolist() == NUM_TOKENS
    with torch.no_grad():
        found: list[list[float]] = model(**batch).logits.softmax(-1).tolist()
    assert (found[0] == pytest.approx(found[1], abs=1e-6)) is (how == "longest_first")
    assert found[0] != pytest.approx(found[2], abs=1e-3)
    return found


def test_the_library(folder: Path, expected: list[list[float]]) -> None:
    predictions = PairClassifier.from_pretrained(folder).predict(PAIRS)
    assert [p.truncated for p in predictions] == TRUNCATED
    assert [p.num_tokens for p in predictions] == NUM_TOKENS
    for prediction, row in zip(predictions, expected, strict=True):
        assert list(prediction.probabilities.values()) == pytest.approx(row, abs=1e-5)


def test_an_evaluation(folder: Path, expected: list[list[float]]) -> None:
    """By the command for the one folder, by the library for the other."""
    lines = [f"{i}\t{a}\t{b}\tpositive" for i, (a, b) in enumerate(PAIRS)]
    Path("some.tsv").write_text(
        "\n".join(["index\tsentence1\tsentence2\tlabel", *lines, ""]), encoding="utf-8"
    )
    if (folder / "training_args.yaml").exists():
        command = [sys.executable, str(ROOT / "evaluate.py"), "--model_dir", str(folder)]
        command += ["--data_file", "some.tsv", "--output_dir", "figures"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
    else:
        evaluate(folder, "some.tsv", output_dir="figures")
    (table,) = Path("figures").rglob("predictions.tsv")
    header, *rows = [line.split("\t") for line in table.read_text(encoding="utf-8").splitlines()]
    truncated, first = header.index("truncated"), header.index("prob_negative")
    assert [row[truncated] for row in rows] == ["1" if flag else "0" for flag in TRUNCATED]
    for row, probabilities in zip(rows, expected, strict=True):
        assert [float(cell) for cell in row[first : first + 3]] == pytest.approx(probabilities, abs=1e-5)


def test_the_service(folder: Path, expected: list[list[float]]) -> None:
    with serving(*make_predictor(folder)) as live:
        assert live.ask("GET", "/info").json["max_seq_length"] == CUT
        for (text_a, text_b), cut, length, row in zip(PAIRS, TRUNCATED, NUM_TOKENS, expected, strict=True):
            answer = live.predict({"text_a": text_a, "text_b": text_b}).json
            assert (answer["truncated"], answer["num_tokens"]) == (cut, length)
            assert list(answer["probabilities"].values()) == pytest.approx(row, abs=1e-5)
        whole = {"text_a": WHOLE[0], "text_b": WHOLE[1], "truncate": False}
        assert live.predict(whole).status == 422 and live.predict({**whole, "text_a": "the"}).status == 200
