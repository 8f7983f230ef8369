"""Labels by name: which one f1 is of, what is said of them, and names for folders that have none."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import write_tiny_bert
from live_server import make_predictor, serving
from safetensors.torch import load_file, save_file
from sklearn.metrics import f1_score

from bertpair import (
    CheckpointError,
    Config,
    ConfigError,
    DataError,
    PairClassifier,
    TrainResult,
    evaluate,
    train,
)
from bertpair.evaluation.evaluate import EvaluationResult, evaluate_models
from bertpair.evaluation.plots import draw_curves
from bertpair.settings.command_line import parse_command_line

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_process")]

HEADER = ("index", "sentence1", "sentence2", "label")
WORDS = "the cat sat mat good bad food 中文".split()


def table(labels: list[str], seed: int = 0) -> list[tuple[object, ...]]:
    rng = np.random.default_rng(seed)
    return [(i, " ".join(rng.choice(WORDS, 3)), rng.choice(WORDS), label) for i, label in enumerate(labels)]


@pytest.fixture
def fit(tmp_path: Path, write_tsv: Callable[..., Path]) -> Callable[..., TrainResult]:
    """fit(column, **settings): train three steps on rows with these labels, into `out`."""

    def run(column: list[str], **settings: object) -> TrainResult:
        if not (tmp_path / "tiny").exists():
            write_tiny_bert(tmp_path / "tiny", initializer_range=0.5)
        train_file = write_tsv("train.tsv", table(column), HEADER)
        dev_file = write_tsv("dev.tsv", table(column[::-1], seed=1), HEADER)
        values = {
            **{"model_name_or_path": "tiny", "from_scratch": True, "output_dir": "out", "max_steps": 3},
            **{"train_file": [str(train_file)], "dev_file": [str(dev_file)], "max_seq_length": 24},
            **{"amp": "off", "num_threads": 1, "learning_rate": 1e-3, "overwrite_output_dir": True},
        }
        return train(Config(**{**values, **settings}))  # type: ignore[arg-type]

    return run


def score(*argv: object) -> EvaluationResult:
    parsed = parse_command_line([str(word) for word in argv], "evaluate")
    return evaluate_models(parsed.config, explicit=parsed.explicit)


def swap_ids(folder: Path, other: Path) -> None:
    """The same network with the ids of its two classes swapped."""
    shutil.copytree(folder, other)
    (other / "manifest.json").unlink()
    tensors = load_file(other / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    config = json.loads((other / "config.json").read_text())
    first, second = config["id2label"]["0"], config["id2label"]["1"]
    config |= {"id2label": {"0": second, "1": first}, "label2id": {second: 0, first: 1}}
    (other / "config.json").write_text(json.dumps(config))


def test_f1_is_of_a_label_by_name_whatever_its_id(fit: Callable[..., TrainResult], tmp_path: Path) -> None:
    result = fit(["neg", "pos", "pos"] * 10, positive_label="neg")
    rows = [line.split("\t") for line in Path("out/predictions.tsv").read_text().splitlines()[1:]]
    gold, predicted = [row[1] for row in rows], [row[2] for row in rows]
    assert result.metrics["f1"] == pytest.approx(f1_score(gold, predicted, pos_label="neg", zero_division=0))
    assert result.metrics["positive_label"] == "neg"
    assert "positive_label = neg" in Path("out/eval_results.txt").read_text()
    swap_ids(tmp_path / "out", tmp_path / "swapped")
    compared = score("--model_dir", "out", "--compare", "swapped")
    one, two = compared.by_model.values()
    assert one["f1"] == two["f1"] == result.metrics["f1"] and two["positive_label"] == "neg"
    other = score("--model_dir", "out", "--compare", "swapped", "--positive_label", "pos")
    expected = pytest.approx(f1_score(gold, predicted, pos_label="pos", zero_division=0))
    assert [figures["f1"] for figures in other.by_model.values()] == [expected, expected]
    assert "positive_label" in other.text and "pos" in other.text


def test_f1_of_nobody_is_refused_before_training(fit: Callable[..., TrainResult]) -> None:
    with pytest.raises(ConfigError, match="positive_label: found 'yes'; allowed: 'neg', 'pos'"):
        fit(["neg", "pos"] * 5, positive_label="yes")
    with pytest.raises(ConfigError, match="f1 is measured with two labels, here are 3"):
        fit(["a", "b", "c"] * 5, positive_label="a")
    with pytest.raises(ConfigError, match="f1 is not measured with 3 labels; allowed: acc, macro_f1"):
        fit(["a", "b", "c"] * 5, metric_for_best_model="f1")
    assert not Path("out").exists()


def test_a_preset_names_its_label_and_without_one_it_is_id_1(fit: Callable[..., TrainResult]) -> None:
    assert fit(["0", "1"] * 8).metrics["positive_label"] == "1"
    assert fit(["right", "wrong"] * 8, labels=["wrong", "right"]).metrics["positive_label"] == "right"
    assert fit(["1", "0"] * 8, labels=["1", "0"], task_name="mrpc").metrics["positive_label"] == "1"


def test_labels_are_counted_in_id_order(
    fit: Callable[..., TrainResult], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "bertpair")
    fit(["b", "a", "a", "c"] * 4, labels=["c", "a", "b"])
    assert "train labels: c 4, a 8, b 4" in caplog.text and "dev labels: c 4, a 8, b 4" in caplog.text


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["yes", "Yes", "no"], "'Yes' and 'yes'"),
        (["2", "\uff12", "0"], "'2' and '\uff12'"),
        (["e\u0301", "\u00e9", "x"], "look alike"),
        (["a\u200bb", "ab", "x"], "look alike"),
        (["a b", "a\u00a0b", "x"], "look alike"),
        (["1", "1.0", "01", "0"], "look alike"),
        (["NaN", "nan", "x"], "'NaN' and 'nan'"),
        (["a\ufe0f", "a", "x"], "'a' and 'a\\ufe0f'"),
        (["\u00e9", "e\u0301", "x"], "'e\\u0301' and '\u00e9'"),  # no two signs that look the same
        ([f"{word}{i}" for i in range(25) for word in ("a", "A")], "; and 5 more"),
        (["0.5", "1.0", "1.5"], "problem_type: regression"),
        ([str(i) for i in range(12)], "problem_type: regression"),
    ],
)
def test_labels_that_look_alike_or_like_scores_are_pointed_out(
    fit: Callable[..., TrainResult], caplog: pytest.LogCaptureFixture, labels: list[str], said: str
) -> None:
    fit(labels * 4, max_steps=1)
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert any(said in warning for warning in warnings), warnings


@pytest.mark.parametrize(
    "labels",
    [
        ["right", "wrong", "partly"],
        ["1", "2", "3"],
        ["0", "1"],
        ["-1", "0", "1"],
        ["1_0", "10"],
        ["nan", "inf", "x"],
    ],
)
def test_sound_labels_are_not(
    fit: Callable[..., TrainResult], caplog: pytest.LogCaptureFixture, labels: list[str]
) -> None:
    fit(labels * 4, max_steps=1)
    assert not [r for r in caplog.records if "alike" in r.getMessage() or "regression" in r.getMessage()]


def test_a_file_with_one_label_alone_is_pointed_out(
    fit: Callable[..., TrainResult], write_tsv: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    fit(["a", "b"] * 6)
    sole = write_tsv("sole.tsv", table(["b"] * 5), HEADER)
    evaluate("out", sole)
    assert "sole.tsv: all 5 rows have the label b" in caplog.text


def nameless(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "manifest.json").unlink()
    settings = (folder / "training_args.yaml").read_text()
    (folder / "training_args.yaml").write_text(settings)


def test_a_folder_without_names_is_told_them(fit: Callable[..., TrainResult], tmp_path: Path) -> None:
    fit(["neg", "pos", "pos"] * 6)
    trained = evaluate("out").metrics
    nameless(tmp_path / "out")
    with pytest.raises(DataError, match="LABEL_0"):
        evaluate("out")
    assert score("--model_dir", "out", "--labels", "neg", "pos").metrics == trained
    assert PairClassifier.from_pretrained("out", labels=["neg", "pos"]).labels == ("neg", "pos")
    with pytest.raises(ConfigError, match="found 3 names; out has 2 labels"):
        PairClassifier.from_pretrained("out", labels=["a", "b", "c"])
    with serving(*make_predictor(tmp_path / "out", labels=["neg", "pos"])) as live:
        assert live.ask("GET", "/info").json["labels"] == ["neg", "pos"]
        assert live.predict().json["label"] in ("neg", "pos")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a", "a"], "found 'a' more than once"),
        ("ab", "a list of at least two labels"),
        (["a", " "], "found an empty one"),
    ],
)
def test_names_that_cannot_be_labels_are_refused(
    fit: Callable[..., TrainResult], tmp_path: Path, names: list[str], said: str
) -> None:
    fit(["neg", "pos", "pos"] * 6)
    nameless(tmp_path / "out")
    with pytest.raises(ConfigError, match=f"labels: .*{said}"):
        PairClassifier.from_pretrained("out", labels=names)
    assert PairClassifier.from_pretrained("out", labels=[" a", "b"]).labels == ("a", "b")


def test_a_regression_is_not_told_names(fit: Callable[..., TrainResult], tmp_path: Path) -> None:
    fit(["1.5", "2", "3"] * 6, problem_type="regression")
    with pytest.raises(ConfigError, match="labels: found 'a', 'b'; .*out is a regression model"):
        PairClassifier.from_pretrained("out", labels=["a", "b"])
    with pytest.raises(ConfigError, match="is a regression model"):
        make_predictor(tmp_path / "out", labels=["a", "b"])


def test_one_models_own_names_are_not_lent_to_another(
    fit: Callable[..., TrainResult], tmp_path: Path
) -> None:
    fit(["neg", "pos", "pos"] * 6, labels=["pos", "neg"])
    shutil.copytree("out", "other")
    nameless(tmp_path / "other")
    with pytest.raises(CheckpointError, match="other: its labels are LABEL_0, LABEL_1, the others' pos, neg"):
        score("--model_dir", "out", "--compare", "other")
    compared = score("--model_dir", "out", "--compare", "other", "--labels", "pos", "neg")
    assert compared.by_model["out"] == compared.by_model["other"]


def test_the_best_of_one_labels_f1_is_not_held_against_anothers(
    fit: Callable[..., TrainResult], caplog: pytest.LogCaptureFixture
) -> None:
    column = ["neg", "pos", "pos"] * 10
    watched = {"metric_for_best_model": "f1", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    one = fit(column, positive_label="neg", **watched)
    two = fit(column, positive_label="pos", overwrite_output_dir=False, resume="auto", **watched)
    assert "another metric or dev set is watched" in caplog.text
    rows = [line.split("\t") for line in Path("out/predictions.tsv").read_text().splitlines()[1:]]
    expected = f1_score([row[1] for row in rows], [row[2] for row in rows], pos_label="pos", zero_division=0)
    assert two.metrics["positive_label"] == "pos" and two.metrics["f1"] == pytest.approx(expected)
    assert one.metrics["positive_label"] == "neg"


def test_curves_name_the_label_of_f1(fit: Callable[..., TrainResult]) -> None:
    settings = {"metric_for_best_model": "f1", "logging_steps": 1}
    drawn = []
    for label in ("neg", "pos"):
        fit(["neg", "pos", "pos"] * 10, positive_label=label, **settings)
        records = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
        assert {r["eval_positive_label"] for r in records if "eval_f1" in r} == {label}
        same = [{**r, "eval_f1": 0.5} if "eval_f1" in r else r for r in records]
        drawn.append(draw_curves([{**r, "loss": 1.0} if "loss" in r else r for r in same], "f1"))
    assert drawn[0] != drawn[1]


def test_a_label_of_two_lines_keeps_eval_results_in_lines(
    fit: Callable[..., TrainResult], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "bertpair")
    fit(['"p\no"', "neg"] * 8, quoting="csv", positive_label="p\no")
    lines = Path("out/eval_results.txt").read_text().splitlines()
    assert all(" = " in line for line in lines)
    assert json.loads(Path("out/eval_results.json").read_text())["positive_label"] == "p\no"
    assert "train labels: neg 8, 'p\\no' 8" in caplog.text


def test_a_folder_with_names_keeps_them(fit: Callable[..., TrainResult], tmp_path: Path) -> None:
    fit(["neg", "pos"] * 6)
    assert PairClassifier.from_pretrained("out", labels=["pos", "neg"]).labels == ("neg", "pos")
    with pytest.raises(ConfigError, match="labels: found 'x', 'y'; .*out was trained for 'neg', 'pos'"):
        make_predictor(tmp_path / "out", labels=["x", "y"])


@pytest.mark.parametrize("labels", [["positive", "negative"], ["positive", "negative", "neutral", "odd"]])
def test_some_of_the_labels_or_one_more_are_another_set(hf_folder: Path, labels: list[str]) -> None:
    with pytest.raises(ConfigError, match="was trained for 'negative', 'neutral', 'positive'"):
        PairClassifier.from_pretrained(hf_folder, labels=labels)


def test_new_head_sets_the_order_that_labels_name(fit: Callable[..., TrainResult]) -> None:
    fit(["neg", "pos"] * 6)
    shutil.move("out", "first")
    fit(["neg", "pos"] * 6, model_name_or_path="first", labels=["pos", "neg"], new_head=True)
    assert PairClassifier.from_pretrained("out").labels == ("pos", "neg")
    fit(["neg", "pos"] * 6, model_name_or_path="first", labels=["pos", "neg"])
    assert PairClassifier.from_pretrained("out").labels == ("neg", "pos")


def test_a_column_that_is_hardly_one_of_labels_gets_a_warning(
    fit: Callable[..., TrainResult], caplog: pytest.LogCaptureFixture
) -> None:
    fit([f"an answer {i}" for i in range(24)] * 2, max_steps=1)
    assert "different labels" not in caplog.text
    fit([f"an answer {i}" for i in range(26)] + ["an answer 1"] * 24, max_steps=1)
    said = "train: 26 different labels in 50 rows; does label_column name the right column?"
    assert said in caplog.text
