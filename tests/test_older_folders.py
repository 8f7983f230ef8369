"""A model folder and a checkpoint that version 0.1.0 wrote still load, evaluate, serve and resume.

`written_by_0_1_0/` is never written anew: `finished` is a run's model folder, `stopped` the same run killed
after step 16 of 24, `predictions.json` what that version answered.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from live_server import make_predictor, serving
from safetensors.torch import load_file

from bertpair import PairClassifier

ROOT = Path(__file__).parent.parent
OLD = Path(__file__).parent / "written_by_0_1_0"
EXPECTED = json.loads((OLD / "predictions.json").read_text(encoding="utf-8"))
PAIRS = [tuple(pair) for pair in EXPECTED["pairs"]]

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_process")]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A copy, in the working directory: its settings name their files relative to that."""
    for path in OLD.iterdir():
        copy = shutil.copytree if path.is_dir() else shutil.copyfile
        copy(path, tmp_path / path.name)
    return tmp_path


def script(name: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / f"{name}.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("folder", ["finished", "stopped/checkpoint-16"])
def test_the_library_answers_as_then(place: Path, folder: str) -> None:
    model = PairClassifier.from_pretrained(place / folder)
    assert model.labels == ("partly", "right", "wrong")
    found = [list(p.probabilities.values()) for p in model.predict(PAIRS)]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(EXPECTED[folder]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("folder", ["finished", "stopped/checkpoint-16"])
def test_evaluate_gives_the_figures_of_then(place: Path, folder: str) -> None:
    done = script("evaluate", "--model_dir", folder, "--data_file", "dev.tsv")
    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout.splitlines()[-1])
    assert metrics["n"] == 16 and metrics["acc"] == EXPECTED["acc"]
    assert metrics["loss"] == pytest.approx(EXPECTED["loss"][folder], abs=1e-5)


@pytest.mark.parametrize("folder", ["finished", "stopped/checkpoint-16"])
def test_the_service_answers_as_then(place: Path, folder: str) -> None:
    with serving(*make_predictor(place / folder)) as live:
        info = live.ask("GET", "/info").json
        assert info["labels"] == ["partly", "right", "wrong"]
        assert info["takes_pairs"] and info["max_seq_length"] == 16
        for (text_a, text_b), expected in zip(PAIRS, EXPECTED[folder], strict=True):
            answer = live.predict({"text_a": text_a, "text_b": text_b}).json
            assert list(answer["probabilities"].values()) == pytest.approx(expected, abs=1e-5)


def test_the_killed_run_goes_on_to_the_finished_weights(place: Path) -> None:
    done = script("train", "--output_dir", "stopped", "--resume")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["global_step"] == 24
    ended, finished = (load_file(place / name / "model.safetensors") for name in ("stopped", "finished"))
    torch.testing.assert_close(ended, finished, rtol=0, atol=1e-5)


def test_a_finished_run_is_not_run_again(place: Path) -> None:
    before = (place / "finished" / "model.safetensors").read_bytes()
    done = script("train", "--output_dir", "finished", "--resume")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["global_step"] == 24
    assert (place / "finished" / "model.safetensors").read_bytes() == before
