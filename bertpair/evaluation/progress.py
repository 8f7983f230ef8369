"""What a person sees while the program works: one moving bar on a terminal, plain log lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

logger = logging.getLogger(__name__)


class Progress:
    """Counts units of work. On a terminal a bar with rate and time left; elsewhere only what `line` is told.

    Lines go through logging either way; the scripts' handler prints all lines above the bar.
    """

    def __init__(
        self, total: int, unit: str, *, initial: int = 0, label: str = "", transient: bool = False
    ) -> None:
        self._total = total
        self._done = initial
        self._started = time.monotonic()
        self._initial = initial
        self._bar: tqdm[Any] | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=total,
                initial=initial,
                unit=unit,
                desc=label or None,
                leave=not transient,
                dynamic_ncols=True,
                smoothing=0.1,
            )

    def advance(self, n: int = 1) -> None:
        """`n` more units are done."""
        self._done += n
        if self._bar is not None:
            self._bar.update(n)

    def show(self, **figures: str) -> None:
        """Put short figures at the end of the bar."""
        if self._bar is not None:
            self._bar.set_postfix(figures, refresh=False)

    def line(self, text: str) -> None:
        """Log one line; without a bar it carries the time left."""
        logger.info("%s%s", text, self._time_left() if self._bar is None else "")

    def _time_left(self) -> str:
        done = self._done - self._initial
        if not done or self._done >= self._total:
            return ""
        seconds = (time.monotonic() - self._started) / done * (self._total - self._done)
        return f", {format_seconds(seconds)} left"

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def format_seconds(seconds: float) -> str:
    """A duration as people say it: 42 s, 3 min 05 s, 2 h 07 min."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
