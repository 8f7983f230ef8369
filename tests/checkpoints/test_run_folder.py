"""What becomes of a write that fails, of a stop at a bad moment, and of two runs in one folder."""

import json
import logging
import os
import resource
import shutil
import signal
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_tiny_bert

from bertpair import CheckpointError, Config, ConfigError, StoppedError, TrainResult, console, train
from bertpair.checkpoints.atomic import Staging
from bertpair.checkpoints.checkpoint import FINAL_READY, newest_whole
from bertpair.checkpoints.lock import RunLock
from bertpair.checkpoints.manifest import verify_folder
from bertpair.console import stop_flag
from bertpair.evaluation.scorer import Scorer
from bertpair.training.loop import Loop
from bertpair.training.setup import Plan
from bertpair.training.step import Stepper

pytestmark = pytest.mark.usefixtures("fresh_process")


def cannot_move(output_dir: Path) -> bool:
    if (output_dir / "final.ready").exists():
        raise OSError(5, "EIO")
    return False


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """Eight steps, a save every second and an evaluation at the end."""
    for name, count in (("train", 32), ("dev", 12)):
        rows = ["index\tsentence1\tsentence2\tlabel"]
        rows += [
            f"{i}\tcat {'the ' * (i % 5)}\t{'good' if i % 3 else 'bad'}\t{i % 3 > 0}" for i in range(count)
        ]
        (tmp_path / f"{name}.tsv").write_text("\n".join(rows) + "\n")
    return {
        "data_dir": str(tmp_path),
        "model_name_or_path": str(write_tiny_bert(tmp_path / "tiny-bert", num_hidden_layers=1)),
        "from_scratch": True,
        "output_dir": "out",
        "max_seq_length": 16,
        "num_train_epochs": 2.0,
        "per_device_train_batch_size": 8,
        "save_steps": 2,
        "logging_steps": 2,
        "eval_strategy": "no",
        "amp": "off",
        "num_threads": 1,
    }


def run(settings: dict[str, Any], **changes: object) -> TrainResult:
    return train(Config(**{**settings, **changes}))


def failing_writes(monkeypatch: pytest.MonkeyPatch, *fails: str) -> None:
    """Saves of folders of these names cannot write their weights."""
    real = Staging.write_tensors

    def write(self: Staging, name: str, *args: Any) -> None:
        if self.folder.name.split(".tmp")[0] in fails:
            raise OSError(28, "No space left on device", str(self.folder / name))
        real(self, name, *args)

    monkeypatch.setattr(Staging, "write_tensors", write)


def unmovable(output_dir: Path) -> bool:
    raise OSError(5, "Input/output error", str(output_dir / "config.json"))


def stop_when(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, matches: Any) -> None:
    """SIGTERM's flag comes up when that method is called with arguments that match."""
    real = getattr(owner, name)

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        if matches(self, *args):
            stop_flag.request(signal.SIGTERM)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, called)


@pytest.mark.slow
def test_a_save_that_fails_twice_is_loud_and_the_run_goes_on(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failing_writes(monkeypatch, "checkpoint-4")
    result = run(settings)
    assert result.global_step == 8 and not result.save_failed
    assert sorted(path.name for path in Path("out").glob("checkpoint-*")) == [
        f"checkpoint-{step}" for step in (2, 6, 8)
    ]
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(said) == 2 and "trying once more" in said[0] and "the next save tries again" in said[1]
    assert all("checkpoint-4 was not saved" in line and "No space left" in line for line in said)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["checkpoint-8", FINAL_READY])
def test_a_failed_last_save_or_final_folder_is_said_and_a_resume_makes_up_for_it(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    run(settings, output_dir="whole")
    with monkeypatch.context() as patch:
        failing_writes(patch, name)
        assert run(settings).save_failed
    assert Path("out/model.safetensors").exists() == (name != FINAL_READY)
    assert run(settings, resume="auto").global_step == 8
    assert Path("out/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()


def test_a_staged_model_that_cannot_be_verified_does_not_end_the_run(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def publish(output_dir: Path) -> bool:
        raise CheckpointError(f"{output_dir / FINAL_READY / 'config.json'}: Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("bertpair.checkpoints.checkpoint.publish_final", publish)
        assert run(settings).save_failed
    assert f"the final model stays in {FINAL_READY}; --resume tries again" in caplog.text
    verify_folder(Path("out", FINAL_READY))
    assert not run(settings, resume="auto").save_failed
    verify_folder(Path("out"))
    assert not Path("out", FINAL_READY).exists()


def test_too_little_room_is_said_before_the_first_step(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 15_000_000))
    with pytest.raises(
        CheckpointError, match=r"out: this run needs 0\.0\d GB, 0\.0\d GB are free; .*save_total"
    ):
        run(settings)
    assert not list(Path("out").glob("checkpoint-*"))
    run(settings, save_steps=0)  # the final model alone has room


def test_room_that_goes_during_the_run_costs_saves_and_not_the_run(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usage = namedtuple("usage", "total used free")

    def disk_usage(path: Path) -> object:
        return usage(10**9, 0, 10_000 if Path("out/checkpoint-2").exists() else 10**9)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    result = run(settings)
    assert result.global_step == 8 and result.save_failed
    assert "checkpoint-4 was not saved" in caplog.text and "the final model needs" in caplog.text
    newest = newest_whole(Path("out"))
    assert newest.path == Path("out/checkpoint-2") and not newest.faults


def test_how_many_checkpoints_are_sure_to_be_kept() -> None:
    def plan(save_steps: int, eval_steps: int) -> Plan:
        often = (
            {"eval_strategy": "steps", "eval_steps": eval_steps} if eval_steps else {"eval_strategy": "no"}
        )
        return Plan(Config(max_steps=100, save_steps=save_steps, **often), 50, ["acc"], has_dev=True)

    assert plan(10, 0).checkpoints_kept(None) == 10 and plan(10, 0).checkpoints_kept(3) == 3
    assert plan(10, 5).checkpoints_kept(3) == 4  # the best is not counted by the limit
    assert plan(0, 5).checkpoints_kept(None) == 1 and plan(0, 0).checkpoints_kept(2) == 0


def test_a_signal_within_a_save_lets_it_finish_and_then_stops(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_when(
        monkeypatch, Staging, "write_json", lambda self, *args: self.folder.name.startswith("checkpoint-4.")
    )
    with pytest.raises(StoppedError) as caught:
        run(settings)
    assert not caught.value.save_failed
    assert newest_whole(Path("out")).path == Path("out/checkpoint-4")
    assert not Path("out/checkpoint-6").exists()


def test_a_stop_whose_save_fails_exits_with_1(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing_writes(monkeypatch, "checkpoint-3")
    stop_when(monkeypatch, Stepper, "step", lambda self, number, *args: number == 3)
    monkeypatch.setattr(console, "install_signal_handlers", lambda: None)
    monkeypatch.setattr(console, "configure_logging", lambda: None)
    assert console.run_script(lambda: 0 if run(settings) else 0) == 1
    assert "the last save failed" in capsys.readouterr().err


def test_a_stop_before_a_resumed_runs_first_step_writes_nothing_anew(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the run stands at is on disk, so a disk that has filled up since does not matter."""
    with monkeypatch.context() as patch:
        stop_when(patch, Stepper, "step", lambda self, number, *args: number == 4)
        with pytest.raises(StoppedError):
            run(settings)
    stop_flag.clear()
    failing_writes(monkeypatch, "checkpoint-4")
    stop_when(monkeypatch, Loop, "run", lambda self: True)
    with pytest.raises(StoppedError) as caught:
        run(settings, resume="auto")
    assert not caught.value.save_failed


def test_before_the_first_step_nothing_is_saved(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_when(patch, Plan, "checkpoints_kept", lambda self, *args: True)
        with pytest.raises(StoppedError):
            run(settings)
    assert sorted(path.name for path in Path("out").iterdir()) == [".lock", ".run.json", "metrics.jsonl"]
    stop_flag.clear()
    assert run(settings, resume="auto").global_step == 8


@pytest.mark.slow
@pytest.mark.parametrize("compact", [False, True])
def test_a_stop_while_the_best_weights_are_measured_saves_the_last_ones(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, compact: bool
) -> None:
    """The best are those of step 4; a stop in their evaluation at the end leaves checkpoint-8 and resumes."""
    best = {
        "eval_strategy": "steps",
        "eval_steps": 4,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "save_steps": 0,
        "compact_vocabulary": compact,
    }
    monkeypatch.setattr("bertpair.training.loop.is_better", lambda metric, value, best: best is None)
    run(settings, **best, output_dir="whole")
    state = json.loads(Path("whole/trainer_state.json").read_text())
    assert (state["weights"], state["weights_step"]) == ("best", 4)
    calls: list[int] = []

    def is_third(self: Scorer, *args: object) -> bool:
        calls.append(1)
        return len(calls) == 3

    with monkeypatch.context() as patch:
        stop_when(patch, Scorer, "logits", is_third)
        with pytest.raises(StoppedError):
            run(settings, **best)
    stop_flag.clear()
    assert Path("out/checkpoint-8").is_dir() and not Path("out/model.safetensors").exists()
    last = Path("out/checkpoint-8/model.safetensors").read_bytes()
    assert last != Path("out/checkpoint-4/model.safetensors").read_bytes()
    run(settings, **best, resume="auto")
    for name in ("model.safetensors", "predictions.tsv"):
        assert Path("out", name).read_bytes() == Path("whole", name).read_bytes(), name
    run(settings, **{**best, "save_steps": 8}, output_dir="saved")
    assert last == Path("saved/checkpoint-8/model.safetensors").read_bytes()


def test_a_resume_waits_for_no_lock_and_looks_only_under_it(settings: dict[str, Any]) -> None:
    run(settings, max_steps=4)
    leftover = Path("out/checkpoint-6.tmp-1")
    leftover.mkdir()
    other = RunLock(Path("out"))
    other.acquire()
    with pytest.raises(CheckpointError, match="is running in this folder"):
        run(settings, resume="auto")
    assert leftover.exists()
    other.release()
    run(settings, resume="auto", resume_anyway=True, max_steps=6)
    assert not leftover.exists()


def test_a_folder_that_somebody_fills_meanwhile_is_not_taken(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = RunLock.acquire

    def acquire(self: RunLock) -> None:
        Path("out/notes.txt").write_text("mine")
        real(self)

    monkeypatch.setattr(RunLock, "acquire", acquire)
    with pytest.raises(ConfigError, match=r"not empty \(notes.txt\)"):
        run(settings)
    assert Path("out/notes.txt").read_text() == "mine" and not Path("out/metrics.jsonl").exists()


def test_the_next_start_completes_a_move_that_was_cut_short(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a start that begins a new run in the folder: until that has its own model, the old one stays."""
    with monkeypatch.context() as patch:
        patch.setattr("bertpair.checkpoints.checkpoint.publish_final", cannot_move)
        run(settings)
    assert not Path("out/model.safetensors").exists()
    stop_when(monkeypatch, Stepper, "step", lambda self, number, *args: True)
    with pytest.raises(StoppedError):
        run(settings, overwrite_output_dir=True, seed=7)
    verify_folder(Path("out"))
    assert not Path("out", FINAL_READY).exists()


@pytest.mark.slow
def test_a_damaged_staged_model_is_named_and_the_run_goes_on_from_its_checkpoint(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("bertpair.checkpoints.checkpoint.publish_final", cannot_move)
        run(settings)
    os.truncate(Path("out", FINAL_READY, "config.json"), 10)
    assert not run(settings, resume="auto").save_failed
    assert "final.ready/config.json: 10 bytes; the manifest says" in caplog.text
    verify_folder(Path("out"))


@pytest.mark.slow
def test_a_new_run_killed_before_its_first_save_can_be_started_again_over_the_old_one(
    settings: dict[str, Any],
) -> None:
    run(settings, max_steps=4, save_steps=0)
    Path("out/.run.json").write_text('{"run_id": "begun"}\n')  # as begin leaves it under overwrite_output_dir
    assert run(settings, resume="auto").global_step == 8


@pytest.mark.slow
def test_another_thread_count_resumes_with_a_warning(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    run(settings, max_steps=4)
    shutil.rmtree("out/eval", ignore_errors=True)
    run(settings, max_steps=6, resume="auto", num_threads=2, resume_anyway=True)
    assert "num_threads was 1, is now 2; results then agree to rounding" in caplog.text


@pytest.mark.slow
def test_another_device_or_version_is_said(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    run(settings, max_steps=4)
    run(settings, max_steps=6, resume="auto", resume_anyway=True)
    assert "agree to rounding" not in caplog.text
    caplog.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bertpair.training.resume.versions", lambda: {"torch": "3.0", "python": "3.11"})
        run(settings, max_steps=8, resume="auto", resume_anyway=True)
    assert f"torch was {torch.__version__}, is now 3.0; results then agree to rounding" in caplog.text


def test_another_watched_metric_begins_a_new_best(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """A loss of 0.6 is no accuracy to beat."""
    settings = {**settings, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    run(settings, max_steps=4, metric_for_best_model="loss")
    shutil.rmtree("out/checkpoint-4")
    Path("out/manifest.json").unlink()
    result = run(settings, max_steps=8, resume="auto", resume_anyway=True, metric_for_best_model="acc")
    assert "another metric or dev set is watched" in caplog.text
    records = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert result.best_metric == max(r["eval_acc"] for r in records if "eval_acc" in r and r["step"] > 2)


def test_the_best_weights_are_not_lost_where_they_are_the_last_and_could_not_be_saved(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings |= {"eval_strategy": "steps", "eval_steps": 8, "load_best_model_at_end": True}
    failing_writes(monkeypatch, "checkpoint-8")
    assert run(settings).global_step == 8
    state = json.loads(Path("out/trainer_state.json").read_text())
    assert (state["weights"], state["weights_step"]) == ("best", 8)
    assert "checkpoint-8 was not saved" in caplog.text and "lost" not in caplog.text


def test_a_full_disk_costs_a_whole_line_of_the_log(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, written = os.write, []

    def write(descriptor: int, data: Any) -> int:
        if bytes(data[:8]) == b'{"step":' and not written:
            written.append(1)
            return real(descriptor, data[:10])
        if len(written) == 1:
            written.append(2)
            raise OSError(28, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    run(settings)
    steps = [json.loads(line)["step"] for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert steps == [4, 6, 8]


@pytest.mark.slow
def test_a_file_size_limit_of_the_system_costs_checkpoints_and_not_the_run(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Real short writes, by the kernel: the file of the optimizer is too large, that of the model is not."""
    run(settings, output_dir="whole")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = Path("whole/checkpoint-8/optimizer.safetensors").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, limits[1]))
    try:
        result = run(settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.save_failed and "File too large" in caplog.text
    assert "the last checkpoint could not be written" in caplog.text
    assert not list(Path("out").glob("checkpoint-*"))
    assert Path("out/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()
