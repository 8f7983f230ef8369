import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from bertpair import Config, ConfigError, DataError, PairClassifier, StoppedError, TrainingError, train
from bertpair.loop import Loop
from bertpair.runtime import stop_flag
from bertpair.stepper import Stepper

ROOT = Path(__file__).parent.parent
TIMES = {"step_seconds", "pairs_per_s", "tokens_per_s", "memory", "eval_seconds"}


@pytest.fixture(autouse=True)
def fresh_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing outside tmp_path is read or written; the stop flag is clear; threads come back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    yield
    stop_flag.clear()
    torch.set_num_threads(threads)


@pytest.fixture
def settings(tiny_config_folder: Path, write_tsv: Callable[..., Path]) -> dict[str, object]:
    """A task that a tiny model learns: does the second text repeat the first one's first word?"""
    rng = np.random.default_rng(3)
    words = ["cat", "sat", "mat", "good", "bad", "food", "中文", "数据库"]
    for name, count in (("data/train.tsv", 180), ("data/dev.tsv", 60)):
        rows = []
        for i in range(count):
            a, b, c = rng.choice(words, 3, replace=False)
            label = rng.choice(["right", "wrong", "partly"])
            answer = {"right": f"{a} {b}", "wrong": c, "partly": a}[label]
            rows.append((i, f"{a} {b}" + " the" * int(rng.integers(0, 6)), answer, label))
        write_tsv(name, rows, header=("index", "sentence1", "sentence2", "label"))
    return {
        "data_dir": "data",
        "model_name_or_path": str(tiny_config_folder),
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
    }


def run(settings: dict[str, object], **changes: object) -> object:
    return train(Config(**{**settings, **changes}))  # type: ignore[arg-type]


def assert_same_run(one: Path, other: Path, checkpoint: str) -> None:
    """Weights, optimizer, predictions and log of two output folders are the same to the bit."""
    for name in ("model.safetensors", "predictions.tsv", "eval_results.txt", f"{checkpoint}/optimizer.safetensors"):
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
    "predictions.tsv",
}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_files_of_a_run(settings: dict[str, object]) -> None:
    result = run(settings)
    assert (result.global_step, result.epoch, result.save_failed) == (24, 2.0, False)
    found = names(Path("out"))
    checkpoints = {name for name in found if name.startswith("checkpoint-")}
    assert found - checkpoints == MODEL_FILES | RESULT_FILES | {".lock", ".run.json", "metrics.jsonl"}
    assert checkpoints >= {f"checkpoint-{step}" for step in (4, 8, 12, 16, 20, 24)}
    for checkpoint in checkpoints:
        assert names(Path("out") / checkpoint) == MODEL_FILES | {"optimizer.safetensors"}
    for path in Path("out").rglob("*"):
        if path.is_file() and path.name != ".lock":
            assert path.stat().st_mode & 0o777 == 0o644, path


def test_metrics_jsonl_has_a_line_per_logged_step_and_per_evaluation(settings: dict[str, object]) -> None:
    result = run(settings)
    records = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == [5, 10, 15, 20, 24]
    assert [r["step"] for r in records if "eval_loss" in r] == [6, 12, 18, 24]
    logged = [r for r in records if "loss" in r]
    assert set(logged[0]) == {"step", "epoch", "loss", "lr", "grad_norm", *TIMES} - {"eval_seconds"}
    sizes = [5, 5, 5, 5, 4]
    mean = sum(n * r["loss"] for n, r in zip(sizes, logged, strict=True)) / 24
    assert result.train_loss == pytest.approx(mean, rel=1e-12)


def test_the_final_folder_answers_as_its_predictions_say(settings: dict[str, object]) -> None:
    result = run(settings, learning_rate=5e-3, num_train_epochs=6.0)
    rows = [line.split("\t") for line in Path("data/dev.tsv").read_text().splitlines()[1:]]
    answers = PairClassifier.from_pretrained("out").predict([(row[1], row[2]) for row in rows])
    table = [line.split("\t") for line in Path("out/predictions.tsv").read_text().splitlines()]
    assert table[0] == ["line", "gold", "predicted", "score", "truncated", "prob_partly", "prob_right", "prob_wrong"]
    assert [row[2] for row in table[1:]] == [answer.label for answer in answers]
    assert [row[1] for row in table[1:]] == [row[3] for row in rows]
    right = sum(answer.label == row[3] for answer, row in zip(answers, rows, strict=True))
    assert result.metrics["acc"] == pytest.approx(right / len(rows))
    assert result.metrics["acc"] > 0.6  # the task is learnable and was learned


def test_the_final_folder_loads_in_transformers_with_equal_logits(settings: dict[str, object]) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    run(settings)
    pairs = [("cat sat", "cat"), ("good 中文 the the", "bad")]
    ours = PairClassifier.from_pretrained("out")
    model = AutoModelForSequenceClassification.from_pretrained("out").eval()
    tokenizer = AutoTokenizer.from_pretrained("out")
    batch = tokenizer([a for a, _ in pairs], [b for _, b in pairs], padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = model(**batch).logits.numpy()
    assert np.abs(ours.logits(pairs) - theirs).max() < 2e-6
    assert model.config.id2label == {0: "partly", 1: "right", 2: "wrong"}


def test_max_steps_is_exact_and_epochs_may_be_fractions(settings: dict[str, object]) -> None:
    assert run(settings, max_steps=7).global_step == 7
    assert run(settings, num_train_epochs=0.4, output_dir="other").global_step == 5  # ceil(0.4 × 12)


def test_accumulation_does_not_change_the_result(settings: dict[str, object]) -> None:
    """8 × 2 and 16 × 1 rows a step, the last group of 4 rows included, give one gradient."""
    still = {"max_steps": 12, "eval_strategy": "no", "save_steps": 0, "model_name_or_path": still_model(settings)}
    run(settings, **still)
    run(settings, **still, output_dir="other", per_device_train_batch_size=16, gradient_accumulation_steps=1)
    one, other = (PairClassifier.from_pretrained(name) for name in ("out", "other"))
    pairs = [("cat sat", "cat"), ("good the", "bad")]
    assert np.abs(one.logits(pairs) - other.logits(pairs)).max() < 1e-4


def still_model(settings: dict[str, object]) -> str:
    """The model without dropout, whose random numbers depend on how a step is cut."""
    path = Path(str(settings["model_name_or_path"])) / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}))
    return str(path.parent)


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """SIGTERM's flag comes up while that step runs."""
    original = Stepper.step

    def stepped(self: Stepper, number: int, *args: object, **kwargs: object) -> None:
        original(self, number, *args, **kwargs)  # type: ignore[arg-type]
        if number == step:
            stop_flag.request(signal.SIGTERM)

    monkeypatch.setattr(Stepper, "step", stepped)


@pytest.mark.parametrize("step", [1, 4, 6, 11, 13, 24])
def test_stopped_and_resumed_equals_uninterrupted(
    settings: dict[str, object], monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Between saves, at a save, at an evaluation (which is cut short), at an epoch's end, at the last step."""
    run(settings, output_dir="whole")
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        with pytest.raises(StoppedError):
            run(settings)
    stop_flag.clear()
    assert (Path("out") / f"checkpoint-{step}").is_dir()
    run(settings, resume="auto")
    assert_same_run(Path("whole"), Path("out"), "checkpoint-24")


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


def test_sigterm_in_the_middle_of_an_epoch_and_resume_end_bitwise_the_same(settings: dict[str, object]) -> None:
    """The scripts themselves, with a real signal: exit code 143, then a resume with no other setting."""
    arguments = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    command = [sys.executable, str(ROOT / "train.py"), *arguments, "--num_threads", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    whole = subprocess.run(
        [*command, "--output_dir", "whole"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert whole.returncode == 0, whole.stderr
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step 15/"):  # epoch 2 begins after step 12
                process.send_signal(signal.SIGTERM)
                break
        rest = process.stderr.read()
        process.wait(timeout=60)
    assert process.returncode == 143, rest
    assert "stopped by signal 15" in rest and not Path("out/model.safetensors").exists()
    resumed = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--output_dir", "out", "--resume"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(Path("whole"), Path("out"), "checkpoint-24")
    first, second = (json.loads(run.stdout.splitlines()[-1]) for run in (whole, resumed))
    assert {**first, "output_dir": "out"} == second
    again = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--output_dir", "out", "--resume"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert again.returncode == 0 and json.loads(again.stdout.splitlines()[-1]) == second
    assert "finished" in again.stderr and not re.search(r"^step ", again.stderr, re.MULTILINE)
