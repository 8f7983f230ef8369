"""What the tests of sweeps share: a training that takes no time, and workers in children of their own."""

import os
import signal
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from bertpair import Config, SweepResult, TrainResult, sweep
from bertpair.search import runs

Params = Mapping[str, Any]


def base(output_dir: str = "out", **changes: Any) -> Config:
    """The settings that a sweep of these tests starts from."""
    given = {"model_name_or_path": "tiny", "from_scratch": True, "train_file": ["train.tsv"]}
    given |= {"dev_file": ["dev.tsv"], "max_seq_length": 24, "amp": "off", "max_steps": 2, "num_threads": 1}
    given |= {"eval_strategy": "no", "save_steps": 0, "output_dir": output_dir}
    return Config(**{**given, **changes})


def figure(config: Config) -> float:
    """What a pretended training measures: it depends on settings and seed alone."""
    return 0.5 + config.weight_decay / 4 - 100 * abs(config.learning_rate - 1e-3) + (config.seed % 3) / 100


def pretend(
    monkeypatch: pytest.MonkeyPatch, measure: Callable[[Config], float] = figure, seconds: float = 0.0
) -> list[tuple[str, int]]:
    """Let runs be trained in no time; the list tells of each, (its trial's folder, its seed).

    No picture is drawn, and a worker looks for what others leave at once.
    """
    done: list[tuple[str, int]] = []

    def train(config: Config, **given: Any) -> TrainResult:
        folder = Path(str(config.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder.parent.parent / ".begun", "a") as file:
            file.write(f"{os.getpid()} {folder.parent.name} {config.seed}\n")
        time.sleep(seconds)
        value = measure(config)
        (folder / "model.safetensors").write_bytes(b"")
        (folder / "config.json").write_text("{}")
        (folder / "predictions.tsv").write_text("line\n")
        done.append((folder.parent.name, config.seed))
        return TrainResult(str(folder), 2, 1.0, 0.5, None, {"acc": value, "loss": 1 - value, "n": 5})

    monkeypatch.setattr(runs, "train", train)
    monkeypatch.setattr("bertpair.search.sweep.draw_sweep", lambda *given: b"")
    monkeypatch.setattr("bertpair.search.report.draw_sweep", lambda *given, as_svg: b"<svg></svg>")
    monkeypatch.setattr("bertpair.search.sweep.POLL_SECONDS", 0.05)
    return done


def begun(folder: Path) -> list[str]:
    """Every run that was begun, by any worker: `trial-000 42`."""
    return [line.partition(" ")[2] for line in (folder / ".begun").read_text().splitlines()]


def rows(result: SweepResult) -> list[tuple[Any, ...]]:
    """A table without seconds and hosts."""
    return [
        (trial.number, trial.settings, trial.figures, trial.mean, trial.deviation, trial.status)
        for trial in result.trials
    ]


def start_worker(config: Config, plan: Mapping[str, Any]) -> int:
    """The process id of a worker in a child."""
    child = os.fork()
    if child == 0:
        signal.alarm(120)
        try:
            sweep(config, plan)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def end_of(child: int) -> int:
    """A child's exit code, or the number of the signal that ended it, below 0."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
