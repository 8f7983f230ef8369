"""Models compared on the same rows: the table, the files, the page."""

import html
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import write_hf_folder
from scipy.stats import binomtest
from sklearn.metrics import cohen_kappa_score

from bertpair import Config, evaluate
from bertpair.__main__ import evaluate as command
from bertpair.evaluation.evaluate import evaluate_models
from bertpair.evaluation.measure import measure

pytestmark = pytest.mark.usefixtures("fresh_process")
LABELS = ["negative", "neutral", "positive"]
HEADER = ("group", "sentence1", "sentence2", "label")


@pytest.fixture
def rows() -> list[tuple[str, ...]]:
    rng = np.random.default_rng(2)
    words = "the cat sat mat good bad food 中文 <b>&amp; مرحبا".split()
    return [
        (f"q{i % 5}", *(" ".join(rng.choice(words, 4)) for _ in "ab"), str(rng.choice(LABELS)))
        for i in range(60)
    ]


@pytest.fixture
def dev(write_tsv: Callable[..., Path], rows: list[tuple[str, ...]]) -> Path:
    return write_tsv("some.tsv", rows, header=HEADER)


@pytest.fixture
def models(hf_folder: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A model, and the same with its labels in another order, which makes another one of it."""
    other = write_hf_folder(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["id2label"] = {"0": "positive", "1": "negative", "2": "neutral"}
    config["label2id"] = {label: int(number) for number, label in config["id2label"].items()}
    (other / "config.json").write_text(json.dumps(config))
    return hf_folder, other


def answers(folder: str) -> list[str]:
    return [line.split("\t")[2] for line in Path(folder, "predictions.tsv").read_text().splitlines()[1:]]


def test_rows_won_and_lost_by_the_names_of_labels(
    models: tuple[Path, Path], dev: Path, rows: list[tuple[str, ...]]
) -> None:
    ours, theirs = models
    result = evaluate_models(Config(model_dir=str(ours), data_file=str(dev), compare=[str(theirs)]))
    named = [answers(result.folders[str(each)]) for each in models]
    gold = [row[3] for row in rows]
    right = [[a == b for a, b in zip(each, gold, strict=True)] for each in named]
    won = sum(a and not b for a, b in zip(*right, strict=True))
    lost = sum(b and not a for a, b in zip(*right, strict=True))
    found = result.comparisons[str(theirs)]
    assert (found.won, found.lost) == (won, lost) and won and lost
    assert found.p_value == pytest.approx(binomtest(won, won + lost).pvalue)
    difference = found.differences["acc"]
    assert difference.value == pytest.approx(np.mean(right[0]) - np.mean(right[1]))
    assert difference.low < difference.value < difference.high
    assert f"{difference.low:+.4f} to {difference.high:+.4f}" in result.text
    said = json.loads(Path(result.folders[str(ours)], "comparison.json").read_text())
    assert said[str(theirs)]["differences"]["macro_f1"] == found.differences["macro_f1"]._asdict()
    assert not Path(result.folders[str(theirs)], "comparison.json").exists()


def test_a_model_against_itself_differs_in_nothing(models: tuple[Path, Path], dev: Path) -> None:
    ours = str(models[0])
    result = evaluate_models(Config(model_dir=ours, data_file=str(dev), compare=[ours]))
    (found,) = result.comparisons.values()
    assert (found.won, found.lost, found.p_value) == (0, 0, 1.0)
    assert set(found.differences.values()) == {(0.0, 0.0, 0.0)}


def test_the_page_of_a_comparison(models: tuple[Path, Path], dev: Path, rows: list[tuple[str, ...]]) -> None:
    words = ["--model_dir", str(models[0]), "--data_file", str(dev), "--compare", str(models[1]), "--report"]
    assert command([*words, "--group_column", "group"]) == 0
    (page,) = models[0].glob("eval/some.tsv-*/report.html")
    text = page.read_text("utf-8")
    for section in ("Models", "Comparison", "Classes", "Calibration", "Groups", "Data", "Command", "Errors"):
        assert re.search(rf"<h2[^>]*>\s*{section}\s*</h2>", text), section
    assert "Rows that only" in text and "<b>&" not in text and "&lt;b&gt;&amp;amp;" in text
    assert any(html.escape(row[1]) in text for row in rows)
    assert "--group_column group" in text and "مرحبا" in text


def test_plain_evaluations_do_without_scikit_learn(models: tuple[Path, Path], dev: Path) -> None:
    program = (
        "import sys; from bertpair.__main__ import evaluate; "
        f"evaluate(['--model_dir', {str(models[0])!r}, '--data_file', {str(dev)!r}]); "
        "assert not {'sklearn', 'scipy', 'jinja2'} & set(sys.modules), 'imported'"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    assert list(models[0].glob("eval/some.tsv-*/errors.tsv"))


def test_figures_of_all_kinds_are_in_the_file(models: tuple[Path, Path], dev: Path) -> None:
    plain = evaluate(models[0], dev)
    file = Path(plain.folders[str(models[0])], "figures.json")
    said = json.loads(file.read_text())
    assert set(said) == {"figures", "classes", "confusion_matrix"}
    assert said["figures"] == pytest.approx(plain.metrics)
    assert sum(map(sum, said["confusion_matrix"])) == 60 and list(said["classes"]) == LABELS
    more = evaluate_models(Config(model_dir=str(models[0]), data_file=str(dev), all_figures=True))
    said = json.loads(file.read_text())
    assert set(said["classes"]["neutral"]) == {"precision", "recall", "f1", "auc", "ap", "rows"}
    assert said["figures"] == pytest.approx(more.metrics) and "ece" in more.metrics
    assert "(95 % interval " in more.text and sum(part["rows"] for part in said["calibration"]) == 60


def test_an_order_of_labels_gives_kappa(models: tuple[Path, Path], dev: Path) -> None:
    order = ["positive", "negative", "neutral"]
    result = evaluate_models(Config(model_dir=str(models[0]), data_file=str(dev), label_order=order))
    (folder,) = result.folders.values()
    said = [line.split("\t")[1:3] for line in Path(folder, "predictions.tsv").read_text().splitlines()[1:]]
    gold, found = ([order.index(row[k]) for row in said] for k in (0, 1))
    assert result.metrics["qwk"] == pytest.approx(cohen_kappa_score(gold, found, weights="quadratic"))
    rng = np.random.default_rng(5)
    logits, ids = rng.normal(size=(50, 3)).astype(np.float32), rng.integers(0, 3, 50)
    ranks = (1, 2, 0)
    places = [[ranks[k] for k in each] for each in (ids, logits.argmax(axis=1))]
    wanted = cohen_kappa_score(*places, labels=[0, 1, 2], weights="quadratic")
    assert measure(logits, ids, LABELS, label_ranks=ranks)["qwk"] == pytest.approx(wanted)
    assert "qwk" not in measure(logits, ids, LABELS)


def test_a_group_column_that_the_model_was_trained_with_may_be_missing(
    models: tuple[Path, Path], dev: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file without it is measured as a whole; asked for now, it is an error."""
    caplog.set_level("INFO")
    config = Config(model_dir=str(models[0]), data_file=str(dev), group_column="topic")
    result = evaluate_models(config)
    assert "does not have group_column topic" in caplog.text and result.metrics["n"] == 60
    with pytest.raises(Exception, match="group_column 'topic' is not in the header"):
        evaluate_models(config, explicit={"group_column"})
