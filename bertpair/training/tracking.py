"""Where a run's figures go besides metrics.jsonl: event files, which TensorBoard shows.

Each record is written at once, with tensorboard's own messages. Its `SummaryWriter` leaves that to a thread,
which prints a traceback when the disk is full; but no tracker may disturb a run.
"""

import io
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bertpair.checkpoints.atomic import append
from bertpair.errors import ConfigError, first_line

TENSORBOARD = "tensorboard"
MAX_FLOAT32 = 3.4028234663852886e38  # an event would hold infinity in place of a larger number

logger = logging.getLogger(__name__)


def check_trackers(report_to: Sequence[str]) -> None:
    """ConfigError, with what to install, if a package is missing or broken that `report_to` needs."""
    if TENSORBOARD not in report_to:
        return
    try:
        _encode({})
    except Exception as error:  # a protobuf that it was not made for raises TypeError
        why = f"report_to: the package tensorboard cannot be used ({first_line(error)})"
        raise ConfigError(f"{why}; pip install tensorboard, or bertpair[tensorboard]") from error


class Tracker:
    """Hands the records of one run on. If that fails, it warns once, and then leaves it.

    Events are in `folder`/tensorboard/`run_id`, in a new file for every start of the run. A start that goes
    on from `first_step` hides what an earlier one wrote of later steps. Between two records nothing is open,
    so there is nothing to close.
    """

    def __init__(self, report_to: Sequence[str], folder: Path, run_id: str, first_step: int) -> None:
        self._file: Path | None = None
        if TENSORBOARD in report_to:
            # TensorBoard reads files in the order of their names.
            self._file = folder / TENSORBOARD / run_id / f"events.out.tfevents.{time.time_ns()}"
            with self._forgiving():
                self._file.parent.mkdir(parents=True, exist_ok=True)
                restart = {"step": first_step + 1, "session_log": {"status": "START"}}
                append(self._file, _encode({"file_version": "brain.Event:2"}, restart))

    def record(self, record: Mapping[str, Any]) -> None:
        """Show a record of metrics.jsonl at its `step`: the finite numbers, as `train/loss` or `eval/acc`."""
        if self._file is None:
            return
        values = [
            {
                "tag": f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}",
                "simple_value": value,
            }
            for name, value in record.items()
            if name != "step" and isinstance(value, int | float) and abs(value) <= MAX_FLOAT32
        ]
        with self._forgiving():
            append(self._file, _encode({"step": record["step"], "summary": {"value": values}}))

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a library raises
            logger.warning("no further figures for TensorBoard, the run goes on: %s", first_line(error))
            self._file = None


def _encode(*events: Mapping[str, Any]) -> bytes:
    """Events as a file holds them."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    file = io.BytesIO()
    writer = RecordWriter(file)
    for event in events:
        writer.write(Event(wall_time=time.time(), **event).SerializeToString())
    return file.getvalue()
