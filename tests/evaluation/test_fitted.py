"""A temperature and a threshold: found on one file, kept with the model, used on another and in serving."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import write_tiny_bert
from live_server import make_predictor, serving
from scipy.special import log_softmax, softmax
from sklearn.metrics import f1_score

from bertpair import CheckpointError, Config, ConfigError, DataError, PairClassifier, train
from bertpair.__main__ import evaluate
from bertpair.checkpoints.manifest import verify_folder
from bertpair.evaluation.evaluate import evaluate_models
from bertpair.settings.stored import stored_settings

pytestmark = [pytest.mark.usefixtures("fresh_process"), pytest.mark.slow]
LABELS = ("no", "yes")


def write_rows(path: Path, count: int, seed: int) -> None:
    """Rows of which a fifth has the wrong label."""
    rng = np.random.default_rng(seed)
    lines = ["index\tsentence1\tsentence2\tlabel"]
    for i in range(count):
        a, b = (" ".join(rng.choice("the cat sat mat good bad food".split(), 3)) for _ in "ab")
        is_yes = ("good" in a) != (rng.random() < 0.2)
        lines.append(f"{i}\t{a}\t{b}\t{LABELS[is_yes]}")
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learnt noise by heart, in `model`; `one.tsv` and `two.tsv` that it has not seen."""
    folder = tmp_path_factory.mktemp("fitted")
    for name, count in ("train", 80), ("one", 600), ("two", 600):
        write_rows(folder / f"{name}.tsv", count, seed=ord(name[0]))
    train(
        Config(
            model_name_or_path=str(write_tiny_bert(folder / "tiny", hidden_dropout_prob=0.0)),
            from_scratch=True,
            train_file=[str(folder / "train.tsv")],
            dev_file=[str(folder / "one.tsv")],
            max_seq_length=24,
            learning_rate=3e-3,
            num_train_epochs=25,
            save_steps=0,
            eval_strategy="no",
            amp="off",
            num_threads=1,
            output_dir=str(folder / "model"),
        )
    )
    return folder


@pytest.fixture
def model(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "fitted")
    return tmp_path / "fitted" / "model"


def ask(model: Path, data: str, *flags: str) -> tuple[dict[str, float], Path]:
    """The last line of evaluate.py, and the folder of its files."""
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr("bertpair.console.say", said.append)
        file = str(model.parent / f"{data}.tsv")
        assert evaluate(["--model_dir", str(model), "--data_file", file, *flags]) == 0
    return json.loads(said[-1]), Path(said[-2].rpartition("files in ")[2])


def table_of(folder: Path) -> list[dict[str, str]]:
    head, *rows = (line.split("\t") for line in (folder / "predictions.tsv").read_text().splitlines())
    return [dict(zip(head, row, strict=True)) for row in rows]


def logits_of(model: Path, data: str) -> tuple[np.ndarray, np.ndarray]:
    rows = [line.split("\t") for line in (model.parent / f"{data}.tsv").read_text().splitlines()[1:]]
    classifier = PairClassifier.from_pretrained(model, optimize=False)
    return classifier.logits([(row[1], row[2]) for row in rows]), np.array([row[3] == "yes" for row in rows])


def test_a_temperature_is_found_once_and_used_where_it_is_asked_for(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    before, _ = ask(model, "two", "--all_figures")
    manifest = (model / "manifest.json").read_bytes()
    fitted, _ = ask(model, "one", "--fit_temperature")
    assert "temperature" not in fitted, "it is found, not used"
    meta = verify_folder(model / "derived" / "temperature").meta
    weights = {entry.name: entry.sha256 for entry in verify_folder(model).files}["model.safetensors"]
    assert meta["weights"] == weights and meta["on"] == "one.tsv (600 rows)"
    caplog.clear()
    assert ask(model, "two")[0]["loss"] == before["loss"] and "temperature 1" not in caplog.text
    after, folder = ask(model, "two", "--all_figures", "--temperature", "stored")
    assert f"temperature {meta['temperature']:.4g}, found on one.tsv (600 rows)" in caplog.text
    assert after["temperature"] == meta["temperature"] > 1.2, "it had learnt noise by heart"
    assert json.loads((folder / "input.json").read_text())["temperature"] == meta["temperature"]
    assert after["acc"] == before["acc"] and after["loss"] < before["loss"]
    logits, gold = logits_of(model, "two")
    scaled = logits.astype(np.float64) / meta["temperature"]
    wanted = -log_softmax(scaled, axis=1)[np.arange(len(gold)), gold.astype(int)].mean()
    assert after["loss"] == pytest.approx(wanted, rel=1e-5)
    for row, probabilities in zip(table_of(folder), softmax(scaled, axis=1), strict=True):
        assert [float(row["prob_no"]), float(row["prob_yes"])] == pytest.approx(list(probabilities), abs=2e-6)
    number, _ = ask(model, "two", "--all_figures", "--temperature", repr(meta["temperature"]))
    assert number == after
    assert (model / "manifest.json").read_bytes() == manifest
    verify_folder(model)


def test_served_probabilities_are_the_offline_ones(model: Path) -> None:
    ask(model, "one", "--fit_temperature", "--fit_threshold")
    _, folder = ask(model, "two", "--temperature", "stored", "--threshold", "stored")
    rows = table_of(folder)[:20]
    texts = [line.split("\t")[1:3] for line in (model.parent / "two.tsv").read_text().splitlines()[1:21]]
    asked = {"temperature": "stored", "threshold": "stored"}
    answers = PairClassifier.from_pretrained(model, **asked).predict([(a, b) for a, b in texts])
    predictor, config = make_predictor(model, **asked)
    with serving(predictor, config) as live:
        info = live.ask("GET", "/info").json
        pairs = [{"text_a": a, "text_b": b} for a, b in texts]
        served = live.predict({"pairs": pairs}, "/v1/predict/batch").json["predictions"]
    decision = predictor.classifier.decision
    assert info["temperature"] == decision.temperature and info["threshold"] == {"yes": decision.threshold}
    for row, answer, said in zip(rows, answers, served, strict=True):
        assert row["predicted"] == answer.label == said["label"]
        for label in LABELS:
            assert answer.probabilities[label] == pytest.approx(float(row[f"prob_{label}"]), abs=1e-5)
            assert said["probabilities"][label] == pytest.approx(answer.probabilities[label], abs=1e-6)
    with serving(*make_predictor(model)) as live:
        info = live.ask("GET", "/info").json
    assert info["temperature"] is info["threshold"] is None, "nothing is used unasked"


@pytest.mark.parametrize("flags", [(), ("--temperature", "3")])
def test_a_threshold_found_on_one_file_decides_on_another(model: Path, flags: tuple[str, ...]) -> None:
    """Also where another temperature is used than when it was found."""
    plain, _ = ask(model, "two")
    ask(model, "one", "--fit_threshold")
    meta = verify_folder(model / "derived" / "threshold").meta
    assert meta["label"] == "yes" and meta["temperature"] is None
    logits, gold = logits_of(model, "one")
    scores = softmax(logits.astype(np.float64), axis=1)[:, 1]
    best = max(f1_score(gold, scores >= each) for each in scores)
    assert f1_score(gold, scores >= meta["threshold"]) == pytest.approx(best)
    found, folder = ask(model, "two", "--threshold", "stored", *flags)
    logits, gold = logits_of(model, "two")
    scores = softmax(logits.astype(np.float64), axis=1)[:, 1]
    is_yes = [row["predicted"] == "yes" for row in table_of(folder)]
    assert is_yes == (scores >= meta["threshold"]).tolist()
    assert found["f1"] == pytest.approx(f1_score(gold, scores >= meta["threshold"]))
    assert found["acc"] == pytest.approx((gold == is_yes).mean())
    assert flags or found["loss"] == plain["loss"]
    number, _ = ask(model, "two", "--threshold", repr(found["threshold"]), *flags)
    assert number == found


def test_a_threshold_may_be_for_the_other_label(model: Path) -> None:
    found, folder = ask(model, "two", "--threshold", "0.9", "--positive_label", "no")
    assert found["positive_label"] == "no" and found["threshold"] == 0.9
    for row in table_of(folder):
        assert (row["predicted"] == "no") == (float(row["prob_no"]) >= 0.9)
        assert row["score"] == row[f"prob_{row['predicted']}"]


def test_nothing_stored_or_of_other_weights_is_refused(model: Path) -> None:
    with pytest.raises(CheckpointError, match="no temperature is stored .* evaluate.py --fit_temperature"):
        ask(model, "two", "--temperature", "stored")
    ask(model, "one", "--fit_temperature")
    other = model.parent / "other"
    shutil.copytree(model, other)
    again = {"output_dir": str(other), "overwrite_output_dir": True, "seed": 7}
    train(Config(**{**stored_settings(model), **again}))
    with pytest.raises(CheckpointError, match="was made of other weights"):
        PairClassifier.from_pretrained(other, temperature="stored")


def test_a_new_fit_replaces_an_older_one(model: Path) -> None:
    ask(model, "one", "--fit_temperature")
    first = verify_folder(model / "derived" / "temperature").meta["temperature"]
    ask(model, "two", "--fit_temperature")
    meta = verify_folder(model / "derived" / "temperature").meta
    assert meta["temperature"] != first and meta["on"] == "two.tsv (600 rows)"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--fit_temperature", "--temperature", "2"), "fit_temperature finds what temperature gives"),
        (("--fit_threshold", "--threshold", "0.5"), "fit_threshold finds what threshold gives"),
        (("--fit_temperature", "--predict"), "needs one model and rows with labels, found predict"),
        (("--temperature", "0"), "expected stored, or a number from 0.01 to 100, or null, found '0'"),
        (("--threshold", "1.5"), "expected stored, or a number from 0 to 1, or null, found '1.5'"),
    ],
)
def test_what_does_not_go_together_is_refused(model: Path, flags: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        ask(model, "one", *flags)


def test_rows_that_no_temperature_suits_are_refused_and_nothing_is_kept(model: Path) -> None:
    classifier = PairClassifier.from_pretrained(model)
    lines = (model.parent / "one.tsv").read_text().splitlines()
    rows = [line.split("\t") for line in lines[1:]]
    answers = classifier.predict([(row[1], row[2]) for row in rows])
    right = ["\t".join([*row[:3], str(answer.label)]) for row, answer in zip(rows, answers, strict=True)]
    (model.parent / "right.tsv").write_text("\n".join([lines[0], *right]) + "\n")
    with pytest.raises(DataError, match="no row of them is wrong"):
        ask(model, "right", "--fit_temperature")
    assert not (model / "derived").exists()


def test_a_model_of_three_labels_has_no_threshold(hf_folder: Path) -> None:
    asked = {"model_dir": str(hf_folder), "data_file": "nothing.tsv"}
    with pytest.raises(ConfigError, match="fit_threshold is for two labels; this model has 3"):
        evaluate_models(Config(**asked, fit_threshold=True))
    with pytest.raises(ConfigError, match="threshold is for two labels; this model has 3"):
        PairClassifier.from_pretrained(hf_folder, threshold=0.4)
    assert PairClassifier.from_pretrained(hf_folder, temperature=2).decision.temperature == 2
