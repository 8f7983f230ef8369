"""The proof in small, by its own command: killed runs, failing system calls, damaged files."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

CRASH = Path(__file__).parents[2] / "benchmarks" / "crash.py"


def crash(folder: Path, *arguments: str) -> str:
    command = [sys.executable, str(CRASH), "--folder", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    """A folder in memory where the system has one: no test here cuts the power."""
    return Path("/dev/shm") if Path("/dev/shm").is_dir() else tmp_path


def test_a_dozen_killed_runs_end_like_an_uninterrupted_one(memory: Path) -> None:
    said = crash(memory, "--kills", "12")
    assert "12/12 identical" in said
    for phase in ("within a save", "while the final folder moves", "in an evaluation", "in a step"):
        assert re.search(rf"[1-9]\d* {phase}", said), said


def test_two_signals_end_a_run_like_a_kill(memory: Path) -> None:
    assert "4/4 identical" in crash(memory, "--kills", "4", "--stop_twice")


def test_failing_system_calls_cost_no_checkpoint_and_do_not_end_the_run(memory: Path) -> None:
    said = crash(memory, "--faults", "--every", "61")
    assert re.search(r"\n[2-9]\d fault points tried", said) and "\n0 with another result" in said


def test_damaged_files_are_caught_and_named_and_the_run_falls_back(memory: Path) -> None:
    said = crash(memory, "--flips", "--every", "29")
    tried, caught = map(int, re.search(r"(\d+) damages tried, (\d+) caught", said).groups())  # type: ignore[union-attr]
    assert tried == caught > 100
    assert "6 runs resumed over a damaged checkpoint, 6 identical" in said
