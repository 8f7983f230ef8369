import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, log_loss

from bertpair import CheckpointError, ConfigError, DataError, PairClassifier, evaluate
from bertpair.command_line import parse_command_line
from bertpair.evaluation import measure
from bertpair.scoring import EvaluationResult, evaluate_models

LABELS = ["negative", "neutral", "positive"]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def dev(write_tsv: Callable[..., Path]) -> Path:
    rng = np.random.default_rng(2)
    words = "the cat sat mat good bad food 中文".split()
    rows = [(i, *(" ".join(rng.choice(words, 4)) for _ in "ab"), rng.choice(LABELS)) for i in range(40)]
    return write_tsv("some.tsv", rows, header=("index", "sentence1", "sentence2", "label"))


def rows_of(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]


def run(*argv: object) -> EvaluationResult:
    parsed = parse_command_line([str(word) for word in argv], "evaluate")
    return evaluate_models(parsed.config, explicit=parsed.explicit)


def test_figures_and_files_of_one_model(hf_folder: Path, dev: Path) -> None:
    result = evaluate(hf_folder, dev)
    gold = [row[3] for row in rows_of(dev)[1:]]
    answers = PairClassifier.from_pretrained(hf_folder).predict([(r[1], r[2]) for r in rows_of(dev)[1:]])
    predicted = [answer.label for answer in answers]
    assert result.metrics["acc"] == pytest.approx(accuracy_score(gold, predicted))
    assert result.metrics["macro_f1"] == pytest.approx(f1_score(gold, predicted, average="macro"))
    table = [[answer.probabilities[label] for label in LABELS] for answer in answers]
    assert result.metrics["loss"] == pytest.approx(log_loss(gold, table, labels=LABELS), rel=1e-6)
    folder = hf_folder / "eval" / "some.tsv"
    assert {path.name for path in folder.iterdir()} == {
        "confusion_matrix.png",
        "eval_results.json",
        "eval_results.txt",
        "predictions.tsv",
    }
    assert json.loads((folder / "eval_results.json").read_text()) == pytest.approx(result.metrics)
    lines = (folder / "eval_results.txt").read_text().splitlines()
    assert lines == sorted(lines) and f"acc = {result.metrics['acc']}" in lines
    found = rows_of(folder / "predictions.tsv")
    assert [row[:3] for row in found[1:]] == [
        [str(i + 2), g, p] for i, (g, p) in enumerate(zip(gold, predicted, strict=True))
    ]


def test_all_checkpoints_in_numeric_order_each_kept(hf_folder: Path, dev: Path) -> None:
    for step in (1000, 200, 30):
        hf_folder.joinpath(f"checkpoint-{step}").mkdir()
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            hf_folder.joinpath(f"checkpoint-{step}", name).write_bytes((hf_folder / name).read_bytes())
    result = run("--model_dir", hf_folder, "--data_file", dev, "--all_checkpoints")
    assert list(result.by_model) == ["checkpoint-30", "checkpoint-200", "checkpoint-1000", "final"]
    order = [result.text.index(name) for name in result.by_model]
    assert order == sorted(order)
    for name in list(result.by_model)[:3]:
        assert (hf_folder / "eval" / name / "eval_results.txt").is_file()
    assert (hf_folder / "eval" / "some.tsv" / "eval_results.txt").is_file()


def test_predicting_a_file_without_labels(hf_folder: Path, dev: Path) -> None:
    bare = Path("bare.tsv")
    bare.write_text("".join("\t".join(row[:3]) + "\n" for row in rows_of(dev)), encoding="utf-8")
    labelled = evaluate(hf_folder, dev)
    result = run("--model_dir", hf_folder, "--data_file", bare, "--predict", "--output_dir", "here")
    assert result.metrics == {} and result.num_rows == 40
    assert {path.name for path in Path("here").iterdir()} == {"predictions.tsv"}
    without = rows_of(Path("here/predictions.tsv"))
    with_gold = rows_of(Path(labelled.folders[str(hf_folder)]) / "predictions.tsv")
    assert without == [[row[0], *row[2:]] for row in with_gold]


def test_a_presets_test_file_has_its_own_columns(hf_folder: Path) -> None:
    Path("test.tsv").write_text("index\tsentence1\tsentence2\n0\tthe cat\tsat\n1\tgood\tbad food\n")
    result = run("--model_dir", hf_folder, "--data_file", "test.tsv", "--predict", "--task_name", "rte")
    assert result.num_rows == 2


def test_two_models_side_by_side_whatever_their_label_order(hf_folder: Path, dev: Path) -> None:
    other = Path("other")
    other.mkdir()
    for path in hf_folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    config = json.loads((other / "config.json").read_text())
    config["id2label"] = {"0": "positive", "1": "neutral", "2": "negative"}
    config["label2id"] = {"positive": 0, "neutral": 1, "negative": 2}
    (other / "config.json").write_text(json.dumps(config))
    result = run("--model_dir", hf_folder, "--data_file", dev, "--compare", "other")
    mine, theirs = result.by_model[str(hf_folder)], result.by_model["other"]
    assert result.metrics == mine
    gold = [row[3] for row in rows_of(dev)[1:]]
    swap = {"positive": "negative", "negative": "positive", "neutral": "neutral"}
    predicted = [row[2] for row in rows_of(hf_folder / "eval/some.tsv/predictions.tsv")[1:]]
    assert theirs["acc"] == pytest.approx(accuracy_score(gold, [swap[label] for label in predicted]))


def test_refusals(hf_folder: Path, dev: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        evaluate("./nowhere", dev)
    with pytest.raises(DataError, match=r"none\.tsv"):
        evaluate(hf_folder, "none.tsv")
    with pytest.raises(ConfigError, match="trained for"):
        run("--model_dir", hf_folder, "--data_file", dev, "--labels", "good", "bad")
    with pytest.raises(CheckpointError, match="checkpoint"):
        run("--model_dir", hf_folder, "--data_file", dev, "--all_checkpoints")
    Path("wrong.tsv").write_text(dev.read_text(encoding="utf-8").replace("neutral", "mixed"))
    with pytest.raises(DataError, match="mixed"):
        evaluate(hf_folder, "wrong.tsv")


def test_measure_of_a_regression() -> None:
    rng = np.random.default_rng(0)
    gold = rng.normal(size=50).astype(np.float32)
    logits = (gold + rng.normal(size=50)).astype(np.float32)[:, None]
    found = measure(logits, gold, None)
    assert found["loss"] == pytest.approx(np.mean((logits[:, 0].astype(float) - gold) ** 2))
    assert found["pearson"] == pytest.approx(np.corrcoef(logits[:, 0], gold)[0, 1], rel=1e-6)
