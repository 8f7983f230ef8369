"""What a run shows and says: above its bar, in curves.png, when it is stopped, before it runs in vain."""

import json
import os
import pty
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from conftest import write_hf_folder, write_tiny_bert

from bertpair import CheckpointError, Config, ConfigError, DataError, PairClassifier, TrainResult, train
from bertpair.checkpoints.checkpoint import list_checkpoints

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_process")]

HEADER = ("index", "sentence1", "sentence2", "label")
ROWS = [(i, "the cat", "sat mat" if i % 2 else "good food", "ab"[i % 2]) for i in range(40)]


@pytest.fixture
def flags(tmp_path: Path, write_tsv: Callable[..., Path]) -> list[str]:
    """A training of ten steps that saves at every third."""
    write_tiny_bert(tmp_path / "tiny")
    write_tsv("train.tsv", ROWS, HEADER)
    write_tsv("dev.tsv", ROWS[:12], HEADER)
    words = "--model_name_or_path tiny --from_scratch --train_file train.tsv --dev_file dev.tsv --amp off"
    words += " --max_seq_length 24 --num_threads 1 --per_device_train_batch_size 8 --max_steps 10"
    return (words + " --save_steps 3 --eval_strategy steps --eval_steps 4 --output_dir out").split()


def run(script: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / f"{script}.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def screen(output: str) -> list[str]:
    """The lines that a terminal shows in the end."""
    lines, column = [[]], 0
    for char in output:
        if char == "\n":
            lines, column = [*lines, []], 0
        elif char == "\r":
            column = 0
        else:
            lines[-1][column : column + 1] = [char]
            column += 1
    return ["".join(line).rstrip() for line in lines]


def test_lines_stand_above_the_bar(flags: list[str]) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, str(ROOT / "train.py"), *flags]
    process = subprocess.Popen(command, stderr=theirs, stdout=subprocess.PIPE)
    os.close(theirs)
    shown, end = b"", time.monotonic() + 120
    while time.monotonic() < end:
        ready, _, _ = select.select([ours], [], [], 1)
        try:
            piece = os.read(ours, 65536) if ready else b""
        except OSError:  # the other side is closed
            break
        shown += piece
    assert process.wait(60) == 0
    process.communicate()
    os.close(ours)
    lines = screen(shown.decode())
    for step in (3, 6, 9, 10):
        assert f"saved out/checkpoint-{step}" in lines, lines
    assert any("10/10" in line for line in lines)


def test_the_curves_show_the_watched_metric(flags: list[str]) -> None:
    heights = {}
    for metric in ("acc", "loss"):
        assert run("train", *flags, "--output_dir", metric, "--metric_for_best_model", metric).returncode == 0
        heights[metric] = matplotlib.image.imread(f"{metric}/curves.png").shape[0]
    assert heights["acc"] > 1.3 * heights["loss"]  # a panel more
    records = [json.loads(line) for line in Path("acc/metrics.jsonl").read_text().splitlines()]
    assert sum("eval_acc" in record for record in records) == 3
    assert np.isfinite([r["eval_acc"] for r in records if "eval_acc" in r]).all()


def test_ctrl_c_says_how_to_go_on_and_that_works(flags: list[str]) -> None:
    longer = [*flags, "--max_steps", "100000", "--eval_strategy", "no", "--save_steps", "0"]
    longer += ["--output_dir", "a new place"]
    command = [sys.executable, str(ROOT / "train.py"), *longer, "--logging_steps", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 2/"):
            process.send_signal(signal.SIGINT)
            break
    _, rest = process.communicate(timeout=60)
    last = rest.splitlines()[-1]
    assert process.returncode == 130 and last.startswith("stopped by Ctrl-C: saved at step ")
    python, script, *advice = shlex.split(last.partition("; continue with ")[2])
    assert (python, script) == ("python", str(ROOT / "train.py"))
    step = list_checkpoints(Path("a new place"))[-1][0]
    again = run("train", *advice, "--max_steps", str(step + 2), "--resume_anyway")
    assert again.returncode == 0 and f"resuming from a new place/checkpoint-{step}" in again.stderr


@pytest.mark.parametrize("command", ["evaluate", "serve"])
def test_a_model_folder_that_is_none_is_said_first(tmp_path: Path, command: str) -> None:
    write_tiny_bert(tmp_path / "tiny")
    missing, empty = run(command, "--model_dir", "./nope"), run(command, "--model_dir", "tiny")
    assert missing.returncode == empty.returncode == 2
    assert "./nope" in missing.stderr and "no such folder" in missing.stderr and "dev" not in missing.stderr
    assert "no weights in it" in empty.stderr and "from_scratch" not in empty.stderr
    Path("run/checkpoint-9").mkdir(parents=True)
    Path("run/checkpoint-10").mkdir()
    with pytest.raises(CheckpointError, match="is not finished; name a checkpoint of it: run/checkpoint-10"):
        PairClassifier.from_pretrained("run")


@pytest.mark.parametrize("command", ["train", "evaluate", "serve"])
def test_advice_holds_in_the_script_that_gives_it(
    tmp_path: Path, write_tsv: Callable[..., Path], command: str
) -> None:
    """No flag is named that the script lacks, and what is named is what helps."""
    folder = write_hf_folder(tmp_path / "three")
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}
    (folder / "config.json").write_text(json.dumps(config))
    write_tsv("rows.tsv", ROWS, HEADER)
    data = {
        "train": [
            "--model_name_or_path",
            "three",
            "--train_file",
            "rows.tsv",
            "--output_dir",
            "out",
            "--max_seq_length",
            "24",
        ],
        "evaluate": ["--model_dir", "three", "--data_file", "rows.tsv"],
        "serve": ["--model_dir", "three", "--port", "0"],
    }[command]
    said = run(command, *data).stderr
    assert "its classifier has 3 outputs, needed are 2; " in said
    assert ("`new_head: true`" in said) == (command == "train")
    if command == "train":
        assert run(command, *data, "--new_head", "--max_steps", "1").returncode == 0
    stray = run(command, "settings.yaml")
    flag = stray.stderr.partition("a flag such as ")[2].partition(",")[0]
    assert stray.returncode == 2 and f"  {flag} " in run(command, "--help").stdout


def test_what_is_to_be_pasted_into_a_shell_is_quoted(tmp_path: Path, write_tsv: Callable[..., Path]) -> None:
    home = tmp_path / "it's my folder"
    home.mkdir()
    for name in ("train.py", "config.yaml"):
        (home / name).write_bytes((ROOT / name).read_bytes())
    lost = subprocess.run(
        [sys.executable, str(home / "train.py")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    advice = lost.stderr.partition("from its own folder: ")[2].splitlines()[0]
    there = subprocess.run(["sh", "-c", f"{advice} && pwd"], capture_output=True, text=True)
    assert there.stdout == f"{home}\n", lost.stderr
    header = ("index", "the 'question'", "$answer", "label")
    write_tiny_bert(tmp_path / "tiny")
    fit(train_file=[str(write_tsv("odd.tsv", ROWS, header))], dev_file=None)
    write_tsv("bare.tsv", ROWS)
    said = run("evaluate", "--model_dir", "out", "--data_file", "bare.tsv").stderr
    words = shlex.split(said.rpartition("such as ")[2])
    assert words[:4] == ["--text_a_column", "the 'question'", "--text_b_column", "$answer"]


BASE = {
    **{"model_name_or_path": "tiny", "from_scratch": True, "train_file": ["train.tsv"], "output_dir": "out"},
    **{"dev_file": ["dev.tsv"], "max_seq_length": 24, "amp": "off", "max_steps": 2, "num_threads": 1},
}


def fit(**settings: object) -> TrainResult:
    return train(Config(**{**BASE, **settings}))  # type: ignore[arg-type]


def test_what_would_be_in_vain_is_refused_or_said(
    flags: list[str], tmp_path: Path, write_tsv: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    for settings, said in (
        ({"metric_for_best_model": "pearson"}, "pearson is not measured with 2 labels; allowed: acc, f1"),
        ({"num_train_epochs": 1e308}, "num_train_epochs: expected a number above 0 and at most"),
    ):
        with pytest.raises(ConfigError, match=said):
            fit(**settings)
    write_tsv("scores.tsv", [*[(i, "a cat", "sat", i) for i in range(5)], (9, "a", "b", "1e30")], HEADER)
    with pytest.raises(DataError, match=r"scores.tsv:7: label '1e30'; .* numbers up to 1e18"):
        fit(train_file=["scores.tsv"], dev_file=None, problem_type="regression")
    write_tsv("scores.tsv", [(i, "a cat", "sat", i) for i in range(5)], HEADER)
    with pytest.raises(ConfigError, match="acc is not measured with a regression"):
        fit(train_file=["scores.tsv"], dev_file=None, task_name="sts-b", metric_for_best_model="acc")
    with pytest.raises(
        ConfigError, match=r"tiny is not empty \(config.json, .* holds no run to resume; --out"
    ):
        fit(resume="auto", output_dir="tiny")
    write_tiny_bert(tmp_path / "single", type_vocab_size=1)
    with pytest.raises(Exception, match="type_vocab_size is 1, and pairs need 2"):
        fit(model_name_or_path="single")
    assert not Path("out").exists()
    fit(dev_file=None, load_best_model_at_end=True, early_stopping_patience=2)
    assert "load_best_model_at_end has no effect: there is no dev file" in caplog.text
    assert "early_stopping_patience has no effect" in caplog.text


EARLY = {"max_steps": 12, "save_steps": 5, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 1e-9}


def test_early_stopping_saves_its_last_step_and_more_patience_goes_on(flags: list[str]) -> None:
    stopped = fit(**EARLY, early_stopping_patience=2)
    assert stopped.global_step == 6 and list_checkpoints(Path("out"))[-1][0] == 6
    resumed = train(
        Config(resume="auto", output_dir="out", early_stopping_patience=20),
        explicit={"resume", "output_dir", "early_stopping_patience"},
    )
    assert resumed.global_step == 12
    whole = fit(**EARLY, early_stopping_patience=20, output_dir="whole")
    assert whole.global_step == 12
    weights = [Path(name, "model.safetensors").read_bytes() for name in ("out", "whole")]
    assert weights[0] == weights[1]


def test_a_finished_run_goes_on_for_more_epochs_or_says_why_not(
    flags: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    def go_on(**settings: object) -> TrainResult:
        given = {"resume": "auto", "output_dir": "out", "resume_anyway": True, **settings}
        return train(Config(**given), explicit=set(given))  # type: ignore[arg-type]

    fit(**{**EARLY, "max_steps": 7})
    assert [step for step, _ in list_checkpoints(Path("out"))] == [2, 5, 7]
    assert go_on(max_steps=9).global_step == 9
    fit(**{**EARLY, "save_steps": 0, "max_steps": 7, "overwrite_output_dir": True})
    go_on(max_steps=9)
    assert "the run ended at step 7; its newest checkpoint is of step 2" in caplog.text
    fit(max_steps=3, save_steps=0, eval_strategy="no", overwrite_output_dir=True)
    with pytest.raises(Exception, match="finished at step 3 and has no checkpoint to go on from"):
        go_on(max_steps=5)
    assert go_on().global_step == 3


def test_a_finished_run_says_what_keeps_it_from_going_on(
    flags: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    def go_on(**settings: object) -> TrainResult:
        caplog.clear()
        given = {"resume": "auto", "output_dir": "out", **settings}
        return train(Config(**given), explicit=set(given))  # type: ignore[arg-type]

    caplog.set_level("INFO")
    stopped = fit(**EARLY, early_stopping_patience=2)
    settings = Path("out/training_args.yaml").read_text()
    assert go_on(max_steps=24, resume_anyway=True) == stopped
    assert "after 2 evaluations without a better one; a larger early_stopping_patience than 2" in caplog.text
    for unused in ({"learning_rate": 1e-3}, {"max_steps": 3}):
        assert go_on(resume_anyway=True, **unused) == stopped
    assert go_on(logging_steps=3, num_threads=3, save_steps=2) == stopped
    assert Path("out/training_args.yaml").read_text() == settings, "what was never used is not stored"
    assert go_on(early_stopping_patience=20, logging_steps=3).global_step == 12
    again = go_on(early_stopping_patience=30)
    assert again.global_step == 12 and "step 12 of 12: nothing is left to train" in caplog.text


@pytest.mark.parametrize(
    "changed",
    [
        {"max_eval_samples": 2},
        {"eval_strategy": "steps", "logging_steps": 2},
        {"load_best_model_at_end": True},
        {"data_dir": "other"},
    ],
    ids=str,
)
def test_a_setting_that_changes_how_a_run_ends_opens_a_finished_run(
    flags: list[str], changed: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    Path("other").mkdir()
    shutil.copy("dev.tsv", "other/dev.tsv")
    shutil.copy("train.tsv", "other/train.tsv")
    base = {"max_steps": 4, "save_steps": 2, "eval_strategy": "epoch"}
    fit(**base, train_file=None, dev_file=None, data_dir=".")
    given = {"resume": "auto", "output_dir": "out", **changed}
    caplog.set_level("INFO")
    result = train(Config(**given), explicit=set(given))  # type: ignore[arg-type]
    assert result.global_step == 4 and "step 4 of 4: nothing is left to train" in caplog.text
    assert result.metrics["n"] == changed.get("max_eval_samples", result.metrics["n"])
    stored = Path("out/training_args.yaml").read_text()
    for name, value in changed.items():
        assert f"{name}: {str(value).lower() if isinstance(value, bool) else value}\n" in stored


def test_a_loss_that_is_not_finite_is_null_in_every_file_and_ends_nothing(flags: list[str]) -> None:
    done = run("train", *flags, "--adam_epsilon", "1e-308")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metrics"]["loss"] is None and "NaN" not in done.stdout
    lines = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert any("eval_loss" in line and line["eval_loss"] is None for line in lines)
    assert json.loads(Path("out/eval_results.json").read_text())["loss"] is None


def test_no_command_waits_for_torchs_compiler(flags: list[str]) -> None:
    """Its import takes over a second, and nothing here is compiled."""
    program = "import sys, runpy; sys.argv[:] = sys.argv[1:]; sys.path.insert(0, sys.argv[1])\n"
    program += "try: runpy.run_path(sys.argv.pop(0), run_name='__main__')\n"
    program += "finally: print('torch._dynamo' in sys.modules)"
    for name, words in (("train", flags), ("evaluate", ["--model_dir", "out"])):
        command = [sys.executable, "-c", program, str(ROOT / f"{name}.py"), str(ROOT), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and done.stdout.splitlines()[-1] == "False", done.stderr
