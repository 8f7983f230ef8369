"""Log lines written by a thread of their own: nobody who logs ever waits for a reader.

A pipe that nobody reads, a stopped terminal or a stuck disk holds up the thread alone. Lines that find the
queue full, or cannot be written, are dropped and counted; one line says so, and one how many they were.
"""

from __future__ import annotations

import itertools
import logging
import os
import select
import threading
from collections import deque

logger = logging.getLogger(__name__)

MAX_LINES = 10_000
FLUSH_SECONDS = 1.0
_LINES_AT_ONCE = 100


class LogWriter(logging.Handler):
    """Writes to an open descriptor, in order. `place` names it in what is said about dropped lines."""

    def __init__(self, descriptor: int, place: str) -> None:
        super().__init__()
        self.descriptor, self.place = descriptor, place
        self.num_dropped = self._num_told = 0
        self._is_failing = False
        self._lines: deque[bytes] = deque()  # each until it is written
        self._changed = threading.Condition()
        threading.Thread(target=self._work, name=f"log to {place}", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record).encode("utf-8", "backslashreplace") + b"\n"
        except Exception:
            self.handleError(record)
            return
        with self._changed:
            if len(self._lines) >= MAX_LINES:
                self.num_dropped += 1
            else:
                self._lines.append(line)
                self._changed.notify_all()

    def flush(self) -> None:
        """Wait until all is written, but not for long: nobody may be reading."""
        with self._changed:
            self._changed.wait_for(lambda: not self._lines, FLUSH_SECONDS)

    def close(self) -> None:
        self.flush()
        self._tell_dropped(len(self._lines))
        super().close()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines)
                lines = list(itertools.islice(self._lines, _LINES_AT_ONCE))
            left, error = _write(self.descriptor, b"".join(lines))
            with self._changed:
                for _ in lines:
                    self._lines.popleft()
                self.num_dropped += left.count(b"\n")
                self._changed.notify_all()
            if error is None:
                self._is_failing = False
                if not self._lines:
                    self._tell_dropped()
            elif not self._is_failing:
                self._is_failing = True
                logger.warning("%s cannot be written: %s; its lines are dropped", self.place, error.strerror)

    def _tell_dropped(self, num_left: int = 0) -> None:
        num_new = self.num_dropped + num_left - self._num_told
        if num_new > 0:
            self._num_told += num_new
            logger.warning("%s: %d log lines were dropped", self.place, num_new)


def _write(descriptor: int, data: bytes) -> tuple[bytes, OSError | None]:
    """What could not be written, and why."""
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:  # whoever gave us the pipe made it so
            select.select([], [descriptor], [], FLUSH_SECONDS)
        except OSError as error:
            return data, error
    return b"", None
