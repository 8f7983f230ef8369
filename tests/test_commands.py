"""The command `bertpair`, and what a program of somebody's own sees of a training: lines, a bar, Ctrl-C."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import write_hf_folder

import bertpair
from bertpair import Config, train
from bertpair.checkpoints.checkpoint import list_checkpoints
from bertpair.console import interruptible, is_command, lines_shown, program, stop_flag

ROOT = Path(__file__).parent.parent
SCRIPTS = ("train", "evaluate", "serve")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_process")]


def run(*command: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment, cwd=cwd)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model `base`, train.tsv of 24 rows and dev.tsv of 12."""
    folder = tmp_path_factory.mktemp("material")
    write_hf_folder(folder / "base")
    for name, count in (("train.tsv", 24), ("dev.tsv", 12)):
        labels = ("negative", "neutral", "positive")
        rows = [f"{i}\tthe cat {i}\tsat {i % 5}\t{labels[i % 3]}" for i in range(count)]
        (folder / name).write_text("\n".join(["index\ta\tb\tlabel", *rows]) + "\n")
    return folder


@pytest.fixture
def settings(material: Path) -> dict[str, object]:
    return {
        "model_name_or_path": str(material / "base"),
        "data_dir": str(material),
        "output_dir": "out",
        "max_seq_length": 24,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2.0,
        "num_threads": 1,
    }


def as_flags(settings: dict[str, object]) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def test_the_command_does_what_the_scripts_do(settings: dict[str, object]) -> None:
    """The same weights to the bit, and evaluate's figures are those of the training."""
    for folder, command in (("by-script", [ROOT / "train.py"]), ("by-command", ["-m", "bertpair", "train"])):
        done = run(*command, *as_flags({**settings, "output_dir": folder}))
        assert done.returncode == 0, done.stderr
    found, expected = (Path(name, "model.safetensors").read_bytes() for name in ("by-command", "by-script"))
    assert found == expected
    advice = "next: python -m bertpair evaluate --model_dir by-command, or: python -m bertpair serve"
    assert advice in done.stderr
    measured = run("-m", "bertpair", "evaluate", "--model_dir", "by-script").stdout
    assert json.loads(measured.splitlines()[-1]) == json.loads(done.stdout)["metrics"]


def test_the_command_alone_says_what_there_is() -> None:
    for words in ((), ("--help",), ("-h",)):
        done = run("-m", "bertpair", *words)
        assert done.returncode == 0 and all(f"bertpair {name} " in done.stdout for name in SCRIPTS)
    assert run("-m", "bertpair", "--version").stdout == f"bertpair {bertpair.__version__}\n"
    wrong = run("-m", "bertpair", "trian", "--seed", "1")
    assert wrong.returncode == 2 and wrong.stdout == ""
    expected = "expected a command: train, evaluate or serve; found 'trian'; did you mean train?"
    assert wrong.stderr == f"error: {expected}\n"
    assert run("-m", "bertpair", "serve", "--help").stdout.startswith("usage: python -m bertpair serve ")


@pytest.mark.parametrize(
    ("started", "command"),
    [
        ("train.py", "python evaluate.py"),
        ("../a clone/serve.py", "python '../a clone/evaluate.py'"),
        ("/usr/bin/bertpair", "bertpair evaluate"),
        ("/usr/lib/bertpair/__main__.py", "python -m bertpair evaluate"),
        ("my_program.py", "bertpair evaluate"),
        ("/usr/lib/my_program/__main__.py", "bertpair evaluate"),
    ],
)
def test_advice_names_the_command_as_it_was_started(
    started: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [started])
    assert program("evaluate") == command
    assert is_command() is ("my_program" not in started)


def test_a_run_tells_its_data_its_plan_and_its_classes(
    settings: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    def lines(**changes: object) -> list[str]:
        caplog.clear()
        train(Config(**{**settings, "overwrite_output_dir": True, **changes}))  # type: ignore[arg-type]
        return "\n".join(caplog.messages).splitlines()

    said, data = lines(save_steps=4, gradient_accumulation_steps=2), settings["data_dir"]
    assert said[0] == f"reading {data}/train.tsv, {data}/dev.tsv"
    (plan,) = [line for line in said if line.startswith("plan: ")]
    parts = ["6 steps (2 epochs of 3 steps)", "8 rows a step (2 batches of 4)", "evaluation every 3 steps"]
    parts += ["checkpoint every 4 steps and at each better acc", "all in out"]
    assert plan == f"plan: {'; '.join(parts)}"
    assert said.index(plan) == next(i for i, line in enumerate(said) if line.startswith("device: cpu")) + 1
    table = said.index("class     precision  recall      f1  rows")
    assert [line.split()[0] for line in said[table + 1 :]] == ["negative", "neutral", "positive"]
    assert said[table - 1] == "dev, with the last weights (step 6):"
    bare = "\n".join(lines(eval_strategy="no", save_steps=0))
    assert "no evaluation on the way; no checkpoints; all in out" in bare
    assert "7 steps (1.17 epochs of 6 steps); 4 rows a step; " in "\n".join(lines(max_steps=7))


def test_the_first_steps_rate_comes_before_the_first_logged_step(
    settings: dict[str, object], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("bertpair.training.loop.FIRST_RATE_SECONDS", 0.0)
    train(Config(**settings, logging_steps=8))  # type: ignore[arg-type]
    steps = [message for message in caplog.messages if message.startswith("step ")]
    assert re.fullmatch(r"step 3/12  [\d.]+ pairs/s, \d+ s left", steps[0])
    assert [re.match(r"step (\d+)", line)[1] for line in steps] == ["3", "6", "8", "12", "12"]  # type: ignore[index]


def test_a_program_of_ones_own_sees_the_lines(settings: dict[str, object]) -> None:
    shown = run("-c", f"import bertpair\nbertpair.train(bertpair.Config(**{settings!r}))\n")
    assert shown.returncode == 0 and "plan: 12 steps" in shown.stderr and shown.stdout == ""


def test_the_lines_handler_goes_with_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    package = logging.getLogger("bertpair")
    monkeypatch.setattr(package, "propagate", False)  # pytest's own handlers are the root's
    before = package.level, list(package.handlers)
    with lines_shown():
        assert len(package.handlers) == 1 and package.level == logging.INFO
        with lines_shown():  # as in a program that has configured logging
            assert len(package.handlers) == 1
    assert (package.level, list(package.handlers)) == before


def test_ctrl_c_in_a_program_of_ones_own_keeps_the_work(
    settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """KeyboardInterrupt after a checkpoint; the handler comes back, and a resume goes on."""
    settings |= {"max_steps": 100_000, "eval_strategy": "no", "logging_steps": 1}

    def interrupt() -> None:
        metrics = Path("out/metrics.jsonl")
        while not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    watcher = threading.Thread(target=interrupt)
    watcher.start()
    with pytest.raises(KeyboardInterrupt, match=r"saved at step \d+; continue with bertpair.train\("):
        train(Config(**settings))  # type: ignore[arg-type]
    watcher.join()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler and not stop_flag
    ((step, _),) = list_checkpoints(Path("out"))
    result = train(Config(output_dir="out", resume=True, max_steps=step + 1, resume_anyway=True))
    assert result.global_step == step + 1


def test_ctrl_c_that_comes_too_late_is_not_lost() -> None:
    with pytest.raises(KeyboardInterrupt, match="after the work was done"), interruptible():
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler and not stop_flag
    with pytest.raises(KeyboardInterrupt, match="^$"), interruptible():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError
    assert not stop_flag
