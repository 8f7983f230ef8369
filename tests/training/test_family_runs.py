"""A run of every family of networks, with a tokenizer of its kind: resumed, read by others, served."""

import csv
import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from live_server import make_predictor, serving
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from bertpair import CheckpointError, Config, ConfigError, PairClassifier, Prediction, train
from bertpair.evaluation.evaluate import evaluate, evaluate_models
from bertpair.evaluation.scorer import softmax
from bertpair.model.config import read_folder
from bertpair.model.families import FAMILIES
from bertpair.serving.predictor import load_predictor
from bertpair.settings.serve import ServeConfig

ROOT = Path(__file__).parents[2]
material = runpy.run_path(str(ROOT / "benchmarks" / "families.py"))

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_process")]


# CamemBERT is XLM-RoBERTa under another name (tests/model/test_families.py has its names).
@pytest.fixture(scope="module", params=[name for name in FAMILIES if name != "camembert"])
def settings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A small piece of the sample, and a network of this family with random weights."""
    folder = tmp_path_factory.mktemp(request.param)
    for name, count in (("train.tsv", 96), ("dev.tsv", 40)):
        lines = (ROOT / "data" / name).read_text(encoding="utf-8").splitlines()[: count + 1]
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    texts = material["sample_texts"]()[:4_000]
    start = material["write_family"](request.param, folder / "start", texts)
    config = json.loads((start / "config.json").read_text())
    drops = {name: 0.1 for name in config if "drop" in name} | {"embedding_dropout": 0.1}
    (start / "config.json").write_text(json.dumps({**config, **drops}))
    whole = {
        "data_dir": str(folder),
        "model_name_or_path": str(start),
        "model_type": request.param.upper().replace("-", ""),
        "from_scratch": True,
        "max_seq_length": 40,
        "max_steps": 10,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "save_steps": 6,
        "amp": "off",
        "num_threads": 1,
    }
    train(Config(**whole, output_dir=str(folder / "whole")))
    return whole


def out(settings: dict[str, Any]) -> Path:
    return Path(settings["data_dir"]) / "whole"


def test_a_run_that_goes_on_from_a_checkpoint_ends_the_same(settings: dict[str, Any], tmp_path: Path) -> None:
    whole = out(settings)
    again = tmp_path / "again"
    again.mkdir()
    shutil.copytree(whole / "checkpoint-6", again / "checkpoint-6")
    train(Config(**settings, output_dir=str(again), resume="auto"))
    for name in ("model.safetensors", "predictions.tsv", "checkpoint-10/optimizer.safetensors"):
        assert (again / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize("settings", ["modernbert"], indirect=True)
def test_a_compact_vocabulary_ends_the_same(settings: dict[str, Any], tmp_path: Path) -> None:
    train(Config(**settings, output_dir=str(tmp_path / "out"), compact_vocabulary=True, max_grad_norm=0.0))
    train(Config(**settings, output_dir=str(tmp_path / "full"), max_grad_norm=0.0))
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "full"))
    assert one == other


def test_transformers_reads_the_folder_and_says_the_same(settings: dict[str, Any]) -> None:
    folder = out(settings)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.model_max_length == 40
    rows = [
        line.split("\t") for line in (folder.parent / "dev.tsv").read_text(encoding="utf-8").splitlines()[1:]
    ]
    ours = PairClassifier.from_pretrained(folder).logits([(row[1], row[2]) for row in rows])
    texts = [row[1] for row in rows], [row[2] for row in rows]
    batch = tokenizer(*texts, truncation="longest_first", padding=True, return_tensors="pt")
    with torch.inference_mode():
        theirs = model(**batch).logits.numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-6 * max(1.0, np.abs(theirs).max()))
    labels = tuple(model.config.id2label[i] for i in range(3))
    assert labels == ("negative", "neutral", "positive") == read_folder(folder).labels


def test_evaluating_and_serving_say_what_training_said(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = out(settings)
    result = evaluate(folder, output_dir=tmp_path / "eval")
    figures = json.loads((folder / "eval_results.json").read_text())
    assert result.metrics["acc"] == figures["acc"] and result.metrics["loss"] == figures["loss"]
    with (folder / "predictions.tsv").open(encoding="utf-8") as file:
        expected = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    rows = [
        line.split("\t") for line in (folder.parent / "dev.tsv").read_text(encoding="utf-8").splitlines()[1:]
    ]
    predictor = load_predictor(ServeConfig(model_dir=str(folder)))
    answers = predictor.run(predictor.encode([row[1] for row in rows], [row[2] for row in rows]))
    for answer, line in zip(answers, expected, strict=True):
        assert isinstance(answer, Prediction) and answer.label == line["predicted"]
        assert answer.score == pytest.approx(float(line["score"]), abs=1e-5)


@pytest.mark.parametrize("settings", ["xlm-roberta"], indirect=True)
def test_the_service_answers(settings: dict[str, Any]) -> None:
    folder, pair = out(settings), {"text_a": "数据库 <s> a database", "text_b": "a database</s>"}
    (expected,) = PairClassifier.from_pretrained(folder).predict([pair])
    with serving(*make_predictor(folder)) as live:
        answer = live.ask("POST", "/v1/predict", pair).json
    assert answer["label"] == expected.label
    assert answer["score"] == pytest.approx(expected.score, abs=1e-5)


def test_openvino_answers_alike(settings: dict[str, Any]) -> None:
    rows = [("数据库", "a database"), ("进程", "线程 thread"), ("x", "y " * 50)]
    exact, other = (
        PairClassifier.from_pretrained(out(settings), engine=name) for name in ("torch", "openvino")
    )
    for given in (rows, rows[:1], rows * 30):
        change = np.abs(softmax(exact.logits(given)) - softmax(other.logits(given))).max()
        assert change < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("settings", ["modernbert", "roberta"], indirect=True)
def test_int8_answers_nearly_alike(settings: dict[str, Any], tmp_path: Path) -> None:
    folder, words = (
        shutil.copytree(out(settings), tmp_path / "model"),
        "数据库 database 进程 thread x y".split(),
    )
    generator = np.random.default_rng(1)
    rows = [tuple(" ".join(generator.choice(words, 4)) for _ in range(2)) for _ in range(600)]
    exact = PairClassifier.from_pretrained(folder)
    model = PairClassifier.from_pretrained(folder, quantize="int8", calibration_pairs=rows)
    assert model.agreement is not None and model.agreement.agreement > 0.95
    assert 0 < np.abs(softmax(exact.logits(rows)) - softmax(model.logits(rows))).max() < 0.2


@pytest.mark.parametrize("settings", ["modernbert", "albert"], indirect=True)
def test_bf16_trains_and_answers(settings: dict[str, Any], tmp_path: Path) -> None:
    train(Config(**{**settings, "amp": "bf16", "max_steps": 3}, output_dir=str(tmp_path / "out")))
    rows = [("数据库", "a database"), ("进程", "线程")]
    exact = PairClassifier.from_pretrained(tmp_path / "out").logits(rows)
    coarse = PairClassifier.from_pretrained(tmp_path / "out", amp="bf16").logits(rows)
    assert np.abs(exact - coarse).max() < 0.1 * max(1.0, np.abs(exact).max())


@pytest.mark.parametrize("settings", ["bert", "modernbert"], indirect=True)
def test_pooling_goes_where_the_model_goes(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    train(Config(**{**settings, "max_steps": 2, "pooling": "max"}, output_dir=str(folder)))
    figures = json.loads((folder / "eval_results.json").read_text())
    assert evaluate(folder, output_dir=tmp_path / "eval").metrics["loss"] == figures["loss"]
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForSequenceClassification.from_pretrained(folder)
    again = {**settings, "model_name_or_path": str(folder), "from_scratch": False, "max_steps": 1}
    train(Config(**again, output_dir=str(tmp_path / "further")))
    for each in (folder, folder / "checkpoint-2", tmp_path / "further"):
        assert read_folder(each).config.pooling == "max"


def test_another_model_type_is_refused_before_anything_is_written(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    own = read_folder(Path(settings["model_name_or_path"])).raw["model_type"]
    other = "XLNET" if own == "bert" else "BERT"
    with pytest.raises(ConfigError, match=f"model_type: found {other}; .* is a {own} model"):
        train(Config(**{**settings, "model_type": other}, output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match=f"model_type: found {other}; .* is a {own} model"):
        evaluate_models(Config(model_dir=str(out(settings)), model_type=other), explicit={"model_type"})


def test_a_folder_of_pretraining_alone_needs_training_before_it_answers(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="train it first"):
        PairClassifier.from_pretrained(settings["model_name_or_path"])
