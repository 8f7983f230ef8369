"""What TensorBoard reads of a run, and what a failure to write it costs: one warning."""

import errno
import logging
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from disk_faults import failing_at, run_with_fault
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bertpair.errors import ConfigError
from bertpair.training.tracking import Tracker, check_trackers

RATES = {"step_seconds": 0.125, "pairs_per_s": 128.3, "tokens_per_s": 4096, "memory": 1.234}


def training_record(step: int, loss: float | None = 0.7) -> dict[str, Any]:
    return {"step": step, "epoch": step / 100, "loss": loss, "lr": 2e-5 / step, "grad_norm": 3.1, **RATES}


def evaluation_record(step: int, acc: float) -> dict[str, Any]:
    figures = {"eval_acc": acc, "eval_n": 12, "eval_positive_label": "ja", "eval_seconds": 0.5}
    return {"step": step, "epoch": step / 100, **figures}


def shown(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by tag, as TensorBoard reads the folder of one run."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()
    assert not any(names for kind, names in tags.items() if kind != "scalars"), tags
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags["scalars"]}


def expected(*records: Mapping[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """The same, worked out from the records."""
    series: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                tag = name.replace("eval_", "eval/") if "eval_" in name else f"train/{name}"
                series.setdefault(tag, []).append((record["step"], float(np.float32(value))))
    return series


def test_tensorboard_shows_every_number_of_the_records(tmp_path: Path) -> None:
    records = [training_record(10), training_record(20, 1 / 3), evaluation_record(20, 0.87)]
    before = time.time()
    tracker = Tracker(["tensorboard"], tmp_path, "run1", 0)
    for record in records:
        tracker.record(record)
    folder = tmp_path / "tensorboard" / "run1"
    found = shown(folder)
    assert found == expected(*records)
    assert found["train/loss"] == [(10, float(np.float32(0.7))), (20, float(np.float32(1 / 3)))]
    assert found["eval/acc"] == [(20, float(np.float32(0.87)))] and "eval/positive_label" not in found
    assert found["train/epoch"][-1] == found["train/epoch"][-2]
    events = EventAccumulator(str(folder)).Reload().Scalars("train/lr")
    assert all(before <= event.wall_time <= time.time() for event in events)


def test_what_is_no_finite_number_is_left_out(tmp_path: Path) -> None:
    tracker = Tracker(["tensorboard"], tmp_path, "run1", 0)
    others = {"inf": math.inf, "nan": math.nan, "null": None, "wide": 1e39, "wider": -(10**400)}
    tracker.record({**training_record(5, None), "skipped_steps": [3, 4], **others})
    assert set(shown(tmp_path / "tensorboard/run1")) == {
        *("train/epoch", "train/lr", "train/grad_norm", "train/memory"),
        *("train/step_seconds", "train/pairs_per_s", "train/tokens_per_s"),
    }


def test_a_resumed_run_shows_no_step_twice(tmp_path: Path) -> None:
    first = Tracker(["tensorboard"], tmp_path, "run1", 0)
    for step in (10, 20, 21, 30, 40):
        first.record(training_record(step))
    first.record(evaluation_record(40, 0.5))
    second = Tracker(["tensorboard"], tmp_path, "run1", 20)
    later = [training_record(30, 0.6), training_record(40, 0.5), evaluation_record(40, 0.9)]
    for record in later:
        second.record(record)
    third = Tracker(["tensorboard"], tmp_path, "run1", 40)
    third.record(training_record(50, 0.4))
    kept = [training_record(10), training_record(20), *later, training_record(50, 0.4)]
    assert shown(tmp_path / "tensorboard/run1") == expected(*kept)


def test_a_record_that_a_crash_cut_off_hides_nothing_of_the_next_start(tmp_path: Path) -> None:
    first = Tracker(["tensorboard"], tmp_path, "run1", 0)
    for step in (10, 20):
        first.record(training_record(step))
    (file,) = (tmp_path / "tensorboard/run1").iterdir()
    os.truncate(file, file.stat().st_size - 5)
    Tracker(["tensorboard"], tmp_path, "run1", 10).record(training_record(20, 0.6))
    assert shown(tmp_path / "tensorboard/run1") == expected(training_record(10), training_record(20, 0.6))


def test_each_run_has_a_folder(tmp_path: Path) -> None:
    for run_id in ("run1", "run2"):
        Tracker(["tensorboard"], tmp_path, run_id, 0).record(training_record(10))
    assert sorted(path.name for path in (tmp_path / "tensorboard").iterdir()) == ["run1", "run2"]


def test_without_a_tracker_nothing_is_written(tmp_path: Path) -> None:
    check_trackers(["none"])
    Tracker(["none"], tmp_path, "run1", 0).record(training_record(10))
    assert not list(tmp_path.iterdir())


def place_a_file(folder: Path) -> None:
    (folder / "tensorboard").write_text("mine")


def place_nothing(folder: Path) -> None:
    pass


def delete_it(folder: Path) -> None:
    shutil.rmtree(folder / "tensorboard")


@pytest.mark.parametrize(
    ("before", "during", "why"),
    [(place_a_file, place_nothing, "tensorboard"), (place_nothing, delete_it, "No such file")],
)
def test_a_folder_that_fails_is_one_warning(
    before: Callable[[Path], None],
    during: Callable[[Path], None],
    why: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    before(tmp_path)
    tracker = Tracker(["tensorboard"], tmp_path, "run1", 0)
    during(tmp_path)
    for step in (10, 20, 30):
        tracker.record(training_record(step))
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING and why in warning.getMessage()
    assert warning.getMessage().startswith("no further figures for TensorBoard, the run goes on: ")


def test_a_full_disk_is_one_warning_and_what_is_written_stays_readable(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = [training_record(step) for step in range(10, 50, 10)]

    def work(folder: Path) -> None:
        tracker = Tracker(["tensorboard"], folder, "run1", 0)
        for record in records:
            tracker.record(record)

    work(tmp_path / "0")  # imports are done
    for k in range(1, 50):
        caplog.clear()
        folder = tmp_path / str(k)
        log, error = run_with_fault(lambda: work(folder), failing_at(k, errno.ENOSPC, for_ever=True))  # noqa: B023
        assert error is None
        if len(log) < k:
            break
        assert [entry.levelno for entry in caplog.records] == [logging.WARNING]
        events = folder / "tensorboard" / "run1"
        found = shown(events) if events.is_dir() else {}
        assert found == expected(*records[: len(found.get("train/loss", []))])
    assert k > 15 and not caplog.records


def test_a_failing_library_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Tracker(["tensorboard"], tmp_path, "run1", 0)
    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", lambda *_: 1 / 0)
    for step in (10, 20):
        tracker.record(training_record(step))
    assert [entry.getMessage().rpartition(": ")[2] for entry in caplog.records] == ["division by zero"]


def test_a_missing_package_is_said_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    check_trackers(["tensorboard"])
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(
        ConfigError, match=r"^report_to: .*pip install tensorboard, or bertpair\[tensorboard\]$"
    ):
        check_trackers(["tensorboard"])
    check_trackers([])


def test_nothing_stays_open_between_records(tmp_path: Path) -> None:
    before = set(threading.enumerate()), os.listdir("/proc/self/fd")
    tracker = Tracker(["tensorboard"], tmp_path, "run1", 0)
    tracker.record(training_record(10))
    assert (set(threading.enumerate()), os.listdir("/proc/self/fd")) == before
