import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_repeats, write_tiny_bert
from safetensors.torch import load_file

from bertpair import (
    CheckpointError,
    Config,
    ConfigError,
    PairClassifier,
    StoppedError,
    TrainingError,
    TrainResult,
    train,
)
from bertpair.checkpoints.checkpoint import weights_digest
from bertpair.checkpoints.derived import derive
from bertpair.checkpoints.manifest import verify_folder
from bertpair.console import stop_flag
from bertpair.settings.command_line import parse_command_line
from bertpair.training.step import Stepper

ROOT = Path(__file__).parents[2]
TIMES = {"step_seconds", "pairs_per_s", "tokens_per_s", "memory", "eval_seconds"}


pytestmark = pytest.mark.usefixtures("fresh_process")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """A task that a tiny model learns: how much of the first text does the second one repeat?"""
    folder = tmp_path_factory.mktemp("material")
    rng = np.random.default_rng(3)
    for name, count in (("train.tsv", 180), ("dev.tsv", 60)):
        write_repeats(folder / name, count, rng)
    return {
        "data_dir": str(folder),
        "model_name_or_path": str(write_tiny_bert(folder / "tiny-bert")),
        "from_scratch": True,
        "output_dir": "out",
        "max_seq_length": 24,
        "learning_rate": 2e-3,
        "num_train_epochs": 2.0,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "logging_steps": 5,
        "save_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 6,
        "amp": "off",
        "num_threads": 1,
    }


@pytest.fixture(scope="module")
def whole(settings: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run(settings, output_dir=str(folder))
    return folder


def run(settings: dict[str, object], **changes: object) -> TrainResult:
    return train(Config(**{**settings, **changes}))  # type: ignore[arg-type]


def assert_same_run(one: Path, other: Path, checkpoint: str) -> None:
    """Weights, optimizer, predictions and log of two output folders are the same to the bit."""
    for name in (
        "model.safetensors",
        "predictions.tsv",
        "eval_results.txt",
        f"{checkpoint}/optimizer.safetensors",
    ):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    logs = []
    for folder in (one, other):
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        logs.append([{k: v for k, v in record.items() if k not in TIMES} for record in records])
    assert logs[0] == logs[1]


MODEL_FILES = {
    "config.json",
    "manifest.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "trainer_state.json",
    "training_args.yaml",
    "vocab.txt",
}
RESULT_FILES = {
    "confusion_matrix.png",
    "curves.png",
    "eval_results.json",
    "eval_results.txt",
    "errors.tsv",
    "figures.json",
    "predictions.tsv",
}
FOR_PEOPLE = {"README.md", "report.html"}  # who may edit them


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_files_of_a_run(whole: Path) -> None:
    found = names(whole)
    checkpoints = {name for name in found if name.startswith("checkpoint-")}
    of_run = {".lock", ".run.json", "metrics.jsonl"}
    assert found - checkpoints == MODEL_FILES | RESULT_FILES | FOR_PEOPLE | of_run
    vouched = {entry.name for entry in verify_folder(whole).files}
    assert vouched == (MODEL_FILES | RESULT_FILES) - {"manifest.json"}
    assert checkpoints >= {f"checkpoint-{step}" for step in (4, 8, 12, 16, 20, 24)}
    for checkpoint in checkpoints:
        assert names(whole / checkpoint) == MODEL_FILES | {"optimizer.safetensors"}
    for path in whole.rglob("*"):
        if path.is_file() and path.name != ".lock":
            assert path.stat().st_mode & 0o777 == 0o644, path


def test_metrics_jsonl_has_a_line_per_logged_step_and_per_evaluation(whole: Path) -> None:
    result = json.loads((whole / "trainer_state.json").read_text())["result"]
    assert (result["global_step"], result["epoch"]) == (24, 2.0)
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == [5, 10, 15, 20, 24]
    assert [r["step"] for r in records if "eval_loss" in r] == [6, 12, 18, 24]
    logged = [r for r in records if "loss" in r]
    assert set(logged[0]) == {"step", "epoch", "loss", "lr", "grad_norm", *TIMES} - {"eval_seconds"}
    sizes = [5, 5, 5, 5, 4]
    mean = sum(n * r["loss"] for n, r in zip(sizes, logged, strict=True)) / 24
    assert result["train_loss"] == pytest.approx(mean, rel=1e-12)


def test_the_final_folder_answers_as_its_predictions_say(settings: dict[str, object]) -> None:
    result = run(settings, learning_rate=5e-3, num_train_epochs=6.0, save_steps=0, eval_strategy="no")
    rows = [
        line.split("\t") for line in Path(str(settings["data_dir"]), "dev.tsv").read_text().splitlines()[1:]
    ]
    answers = PairClassifier.from_pretrained("out").predict([(row[1], row[2]) for row in rows])
    table = [line.split("\t") for line in Path("out/predictions.tsv").read_text().splitlines()]
    assert table[0] == [
        "line",
        "gold",
        "predicted",
        "score",
        "truncated",
        "prob_partly",
        "prob_right",
        "prob_wrong",
    ]
    assert [row[2] for row in table[1:]] == [answer.label for answer in answers]
    assert [row[1] for row in table[1:]] == [row[3] for row in rows]
    right = sum(answer.label == row[3] for answer, row in zip(answers, rows, strict=True))
    assert result.metrics["acc"] == pytest.approx(right / len(rows))
    assert result.metrics["acc"] > 0.6  # the task is learnable and was learned


def test_the_final_folder_loads_in_transformers_with_equal_logits(whole: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    pairs = [("cat sat", "cat"), ("good 中文 the the", "bad")]
    ours = PairClassifier.from_pretrained(whole)
    model = AutoModelForSequenceClassification.from_pretrained(whole).eval()
    tokenizer = AutoTokenizer.from_pretrained(whole)
    batch = tokenizer([a for a, _ in pairs], [b for _, b in pairs], padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = model(**batch).logits.numpy()
    assert np.abs(ours.logits(pairs) - theirs).max() < 2e-6
    assert model.config.id2label == {0: "partly", 1: "right", 2: "wrong"}


def test_max_steps_is_exact_and_epochs_may_be_fractions(settings: dict[str, object]) -> None:
    assert run(settings, max_steps=7, do_train=True).global_step == 7
    assert run(settings, num_train_epochs=0.4, do_train=True, output_dir="other").global_step == 5  # of 12


def test_accumulation_does_not_change_the_result(settings: dict[str, object]) -> None:
    """8 × 2 and 16 × 1 rows a step, the last group of 4 rows included, give one gradient."""
    still = write_tiny_bert(Path("still"), hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    same = {"max_steps": 12, "eval_strategy": "no", "save_steps": 0, "model_name_or_path": str(still)}
    run(settings, **same)
    run(settings, **same, output_dir="other", per_device_train_batch_size=16, gradient_accumulation_steps=1)
    one, other = (PairClassifier.from_pretrained(name) for name in ("out", "other"))
    pairs = [("cat sat", "cat"), ("good the", "bad")]
    assert np.abs(one.logits(pairs) - other.logits(pairs)).max() < 1e-4


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """SIGTERM's flag comes up while that step runs."""
    original = Stepper.step

    def stepped(self: Stepper, number: int, *args: object, **kwargs: object) -> None:
        original(self, number, *args, **kwargs)  # type: ignore[arg-type]
        if number == step:
            stop_flag.request(signal.SIGTERM)

    monkeypatch.setattr(Stepper, "step", stepped)


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 6, 12, 23])
def test_stopped_and_resumed_equals_uninterrupted(
    settings: dict[str, object], whole: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Between saves, at an evaluation (which is cut short), at an epoch's end, before the last step."""
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        with pytest.raises(StoppedError):
            run(settings)
    stop_flag.clear()
    assert (Path("out") / f"checkpoint-{step}").is_dir()
    run(settings, resume="auto")
    assert_same_run(whole, Path("out"), "checkpoint-24")


@pytest.mark.slow
def test_a_stop_in_an_evaluation_is_noted_and_the_resume_evaluates_first(
    settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        with pytest.raises(StoppedError):
            run(settings)
    stop_flag.clear()
    state = json.loads(Path("out/checkpoint-6/trainer_state.json").read_text())
    assert state["evaluation_pending"] is True
    run(settings, resume="auto")
    records = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "eval_loss" in r] == [6, 12, 18, 24]


@pytest.mark.slow
def test_sigterm_in_the_middle_of_an_epoch_and_resume_end_bitwise_the_same(
    settings: dict[str, object], whole: Path
) -> None:
    """The scripts themselves, with a real signal: exit code 143, then a resume with no other setting."""
    arguments = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step 15/"):  # epoch 2 begins after step 12
                process.send_signal(signal.SIGTERM)
                break
        rest = process.stderr.read()
        process.wait(timeout=60)
    assert process.returncode == 143, rest
    assert "stopped by SIGTERM: saved at step" in rest and "train.py --resume --output_dir out" in rest
    assert not Path("out/model.safetensors").exists()
    resume = [sys.executable, str(ROOT / "train.py"), "--output_dir", "out", "--resume"]
    resumed = subprocess.run(resume, env=environment, capture_output=True, text=True, timeout=120)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(whole, Path("out"), "checkpoint-24")
    result = json.loads(resumed.stdout.splitlines()[-1])
    assert result["global_step"] == 24 and result["output_dir"] == "out"
    again = subprocess.run(resume, env=environment, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and json.loads(again.stdout.splitlines()[-1]) == result
    assert "finished" in again.stderr and not re.search(r"^step ", again.stderr, re.MULTILINE)


def test_too_many_skipped_steps_in_a_row_end_the_run(
    settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From step 7 on every loss is NaN: the last whole checkpoint stands, and its weights are finite."""
    original = Stepper.step

    def poisoned(self: Stepper, number: int, *args: Any, denominator: float, **kwargs: Any) -> None:
        original(self, number, *args, denominator=denominator if number < 7 else float("nan"), **kwargs)

    monkeypatch.setattr(Stepper, "step", poisoned)
    with pytest.raises(TrainingError, match="max_skipped_steps 3"):
        run(settings, max_skipped_steps=3)
    assert (Path("out") / "checkpoint-6").is_dir() and not (Path("out") / "model.safetensors").exists()


def test_a_skipped_step_leaves_the_weights_and_names_its_rows(
    settings: dict[str, object], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = Stepper.step

    def poisoned(self: Stepper, number: int, *args: Any, denominator: float, **kwargs: Any) -> None:
        before = [p.detach().clone() for p in self.model.parameters()]
        original(self, number, *args, denominator=denominator if number != 3 else float("nan"), **kwargs)
        same = all(torch.equal(a, b) for a, b in zip(before, self.model.parameters(), strict=True))
        assert same == (number == 3)

    monkeypatch.setattr(Stepper, "step", poisoned)
    result = run(settings, max_steps=6, do_train=True)
    assert result.global_step == 6 and np.isfinite(result.train_loss)
    assert "step 3 skipped" in caplog.text and "train.tsv:" in caplog.text


def test_the_best_weights_at_the_end(settings: dict[str, object]) -> None:
    """With the worst possible course after step 6 the best checkpoint is that of step 6, and it is kept."""
    changes = {"load_best_model_at_end": True, "save_steps": 0, "metric_for_best_model": "loss"}
    result = run(settings, **changes, save_total_limit=1, early_stopping_patience=2, learning_rate=0.05)
    state = json.loads(Path("out/trainer_state.json").read_text())
    best = Path("out", f"checkpoint-{state['best_step']}", "model.safetensors").read_bytes()
    assert state["weights"] == "best" and Path("out/model.safetensors").read_bytes() == best
    assert result.metrics["loss"] == pytest.approx(result.best_metric, abs=1e-12)
    waited = (result.global_step - state["best_step"]) // 6
    assert waited == 2 or result.global_step == 24


@pytest.mark.slow
def test_overwriting_keeps_the_old_run_until_the_new_one_has_a_checkpoint(
    settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(settings, max_steps=4, eval_strategy="no")
    Path("out/notes.txt").write_text("mine")
    old = Path("out/model.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(StoppedError):
            run(settings, overwrite_output_dir=True, seed=7, save_steps=3)
    stop_flag.clear()
    assert names(Path("out")) & {"checkpoint-2", "checkpoint-4"} == {"checkpoint-2"}
    assert Path("out/model.safetensors").read_bytes() == old
    assert Path("out/notes.txt").read_text() == "mine"
    with pytest.raises(ConfigError, match="seed: the run has 7"):
        run(settings, resume="auto", seed=8)
    with pytest.raises(ConfigError, match="resume_anyway"):
        run(settings, resume="auto", seed=7, save_steps=3, weight_decay=0.5)
    result = run(settings, resume="auto", resume_anyway=True, seed=7, save_steps=3, weight_decay=0.5)
    assert result.global_step == 24


def test_overwriting_a_run_without_checkpoints_of_its_own_leaves_no_old_ones(
    settings: dict[str, object],
) -> None:
    run(settings, max_steps=4)
    assert (Path("out") / "checkpoint-4").is_dir()
    run(settings, max_steps=2, overwrite_output_dir=True, eval_strategy="no", save_steps=0)
    assert not list(Path("out").glob("checkpoint-*"))


@pytest.mark.slow
def test_what_was_derived_from_a_model_does_not_hinder_a_run(
    settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def derive_part(folder: str) -> Path:
        made_of = {"weights": weights_digest(Path(folder))}
        return derive(Path(folder), "part", made_of, lambda staging: {})[0]

    quick = {"max_steps": 8, "eval_strategy": "no", "learning_rate": 1e-3}
    run(settings, **quick, output_dir="whole")
    run(settings, max_steps=4, eval_strategy="no")
    old = [derive_part(folder) for folder in ("out", "out/checkpoint-4")]
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(StoppedError):
            run(settings, **quick, overwrite_output_dir=True)
    stop_flag.clear()
    assert old[0].is_dir() and not old[1].exists()
    derive_part("out/checkpoint-2")
    run(settings, **quick, resume="auto", save_total_limit=1)
    assert_same_run(Path("out"), Path("whole"), "checkpoint-8")
    assert names(Path("out")) == {*names(Path("whole")) - {"checkpoint-4"}, "derived"}
    before = verify_folder(old[0]).meta
    assert verify_folder(derive_part("out")).meta != before
    verify_folder(Path("out"))


def test_a_resume_needs_the_same_rows(settings: dict[str, object]) -> None:
    run(settings, max_steps=4)
    lines = Path(str(settings["data_dir"]), "train.tsv").read_text().splitlines(keepends=True)
    Path("train.tsv").write_text("".join(lines[:-1]))
    changes = {"max_steps": 8, "resume": "auto", "resume_anyway": True, "train_file": ["train.tsv"]}
    with pytest.raises(CheckpointError, match="training data"):
        run(settings, **changes)


def test_regression(settings: dict[str, object]) -> None:
    rng = np.random.default_rng(5)
    for name, count in (("train.tsv", 200), ("dev.tsv", 60)):
        rows = ["index\tsentence1\tsentence2\tscore"]
        for i in range(count):
            k = int(rng.integers(0, 5))
            rows.append(f"{i}\tcat\tmat{' good' * k}{' bad' * (4 - k)}\t{k}.0")
        Path(name).write_text("\n".join(rows) + "\n")
    changes = {"data_dir": ".", "problem_type": "regression", "eval_strategy": "no", "save_steps": 0}
    result = run(settings, **changes, num_train_epochs=8.0)
    assert result.metrics["pearson"] > 0.8
    assert set(result.metrics) == {"loss", "pearson", "spearmanr", "corr", "n"}
    header, first = Path("out/predictions.tsv").read_text().splitlines()[:2]
    assert header.split("\t") == ["line", "gold", "predicted", "score", "truncated"]
    answer = PairClassifier.from_pretrained("out").predict([("cat", "mat good bad bad bad")])[0]
    assert answer.label is None and answer.probabilities == {}
    assert not (Path("out") / "confusion_matrix.png").exists()


def test_the_2020_command_line_trains_as_it_stands(settings: dict[str, object]) -> None:
    """run_glue.py's own words, but for a local model folder; four columns under a GLUE task's name."""
    Path("checkpoints").mkdir()
    Path("checkpoints/old.txt").write_text("kept")
    os.symlink(str(settings["data_dir"]), "data")
    line = (
        "--model_type BERT --model_name_or_path MODEL --task_name MNLI-MM --do_train --do_eval "
        "--data_dir ./data/ --max_seq_length 40 --learning_rate 2e-5 --num_train_epochs 1 --weight_decay 0 "
        "--save_steps 2000 --logging_steps 2000 --overwrite_output_dir --output_dir ./checkpoints/"
    )
    argv = line.replace("MODEL", str(settings["model_name_or_path"])).split()
    parsed = parse_command_line([*argv, "--from_scratch"], "train")
    result = train(parsed.config, explicit=parsed.explicit)
    assert result.global_step == 12 and result.metrics["n"] == 60
    assert "acc" in Path("checkpoints/eval_results.txt").read_text()
    assert json.loads(Path("checkpoints/config.json").read_text())["id2label"]["0"] == "partly"
    assert Path("checkpoints/old.txt").read_text() == "kept"


@pytest.mark.slow
def test_a_compact_vocabulary_trains_to_the_same_model_and_resumes(
    settings: dict[str, object], whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal to rounding (gradients are clipped here), unused rows to the bit; resumed, bitwise."""
    run(settings, compact_vocabulary=True, output_dir="compact")
    full, ours = (load_file(folder / "model.safetensors") for folder in (whole, Path("compact")))
    assert full.keys() == ours.keys()
    for name, tensor in full.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=2e-5, msg=name)
    words = "bert.embeddings.word_embeddings.weight"
    state = load_file("compact/checkpoint-24/optimizer.safetensors")
    unused = np.setdiff1d(np.arange(len(full[words])), state["vocabulary.used_ids"].numpy())
    assert len(unused) > 20 and torch.equal(full[words][unused], ours[words][unused])
    with monkeypatch.context() as patch:
        stop_after(patch, 13)
        with pytest.raises(StoppedError):
            run(settings, compact_vocabulary=True)
    stop_flag.clear()
    run(settings, compact_vocabulary=True, resume="auto")
    assert_same_run(Path("compact"), Path("out"), "checkpoint-24")


@pytest.mark.slow
def test_do_eval_alone_measures_what_stands_in_output_dir(settings: dict[str, object], whole: Path) -> None:
    """As run_glue.py did; the model is not trained further and its files stay."""
    before = (whole / "model.safetensors").read_bytes()
    data = str(settings["data_dir"])
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        "--do_eval",
        "--output_dir",
        str(whole),
        "--data_dir",
        data,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    trained = json.loads((whole / "trainer_state.json").read_text())["result"]["metrics"]
    assert json.loads(done.stdout.splitlines()[-1])["acc"] == trained["acc"]
    assert (whole / "model.safetensors").read_bytes() == before
