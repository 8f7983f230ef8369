"""What the scripts share: standard streams, signals, log lines, the progress bar, exit codes.

0 done; 1 a defect of ours (its traceback), or a run whose last save failed; 2 the user's error;
128 + signal number after SIGINT (130) and SIGTERM (143).
"""

from __future__ import annotations

import io
import itertools
import logging
import math
import os
import select
import shlex
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from tqdm import tqdm

from bertpair.errors import BertpairError, ConfigError, ElsewhereError, StoppedError

logger = logging.getLogger(__name__)

MAX_LINES = 10_000  # that a log keeps while nobody takes them
FLUSH_SECONDS = 1.0
REPEATED_WITHIN = 2.0  # seconds after a signal, torchrun's own of the same kind
_LINES_AT_ONCE = 100
SCRIPTS = ("train.py", "evaluate.py", "serve.py")
SEEN_BY_ALL = ("bertpair.data", "bertpair.training")  # the same rows and steps in each process of a run


class StopFlag:
    """Set by a signal, polled by whatever runs long: between steps, batches, chunks of a file."""

    signum: int | None = None

    def __bool__(self) -> bool:
        return self.signum is not None

    def request(self, signum: int) -> None:
        self.signum = signum

    def clear(self) -> None:
        self.signum = None

    def raise_if_set(self) -> None:
        """Raise `StoppedError` with the signal's number if one has come."""
        if self.signum is not None:
            raise StoppedError(self.signum)


stop_flag = StopFlag()


def rank_and_size() -> tuple[int, int]:
    """Which of how many processes of a run this one is, as torchrun says; (0, 1) where it runs alone."""
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        return 0, 1
    return (rank, size) if 0 <= rank < size else (0, 1)


def check_alone(what: str) -> None:
    """ConfigError where torchrun started several processes for what only one can do."""
    if rank_and_size()[1] > 1:
        raise ConfigError(f"{what} runs in one process: start it without torchrun")


def install_signal_handlers() -> None:
    """SIGINT and SIGTERM set the stop flag; a second one, of either kind, kills the process at once.

    Where torchrun started it, one that follows at once is passed over: whoever ends all processes of a
    service or a job reaches torchrun too, which passes its own on.
    """
    signals = (signal.SIGINT, signal.SIGTERM)
    is_alone, first = rank_and_size()[1] == 1, math.inf

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal first
        stop_flag.request(signum)
        first = min(first, time.monotonic())
        is_repeated = time.monotonic() > first + REPEATED_WITHIN
        if is_alone or is_repeated:  # at once, so that the second one kills even inside a long torch call
            for each in signals:
                signal.signal(each, signal.SIG_DFL)
        if is_repeated:
            os.kill(os.getpid(), signum)

    for each in signals:
        signal.signal(each, stop)


@contextmanager
def interruptible() -> Iterator[None]:
    """In a program of somebody's own: Ctrl-C sets the stop flag, so that the work within ends with a
    checkpoint or is finished. KeyboardInterrupt then says how to go on. A second Ctrl-C interrupts at once.

    Does nothing where the program handles Ctrl-C itself, and outside the main thread.
    """
    usual = signal.default_int_handler
    is_main_thread = threading.current_thread() is threading.main_thread()
    if not is_main_thread or signal.getsignal(signal.SIGINT) is not usual:
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        stop_flag.request(signum)
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    except StoppedError as stopped:
        if stopped.signum != signal.SIGINT:
            raise
        raise KeyboardInterrupt(str(stopped)) from None
    else:
        if stop_flag.signum == signal.SIGINT:  # it came too late to stop anything but what follows
            raise KeyboardInterrupt("stopped by Ctrl-C, after the work was done")
    finally:
        signal.signal(signal.SIGINT, usual)
        if stop_flag.signum == signal.SIGINT:
            stop_flag.clear()


def run_script(main: Callable[[], int]) -> int:
    """Run `main` and return the exit code; only what the user can put right becomes one line."""
    for descriptor in range(3):  # streams closed for us lead nowhere: no file of ours must take their numbers
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")
    configure_logging()
    try:
        return main()
    except StoppedError as stopped:
        line, code = str(stopped), 1 if stopped.save_failed else 128 + stopped.signum
        if rank_and_size()[0]:  # all were stopped, and the first one says so
            return code
    except ElsewhereError:
        return 2
    except BertpairError as error:
        line, code = f"{_process_name()}error: {error}", 2
    with suppress(OSError):  # there is nowhere else to say it
        sys.stderr.write(f"{line}\n")
    return code


def is_command() -> bool:
    """Whether this program is one of ours; otherwise somebody's own uses the library."""
    return Path(sys.argv[0]).name in (*SCRIPTS, "bertpair") or _is_module()


def _is_module() -> bool:
    """Whether it was started by `python -m bertpair`; somebody's own may be a __main__.py too."""
    return Path(sys.argv[0]).parts[-2:] == ("bertpair", "__main__.py")


def program(command: str) -> str:
    """How whoever started this program starts `command`: as a script if it was one, else `bertpair …`."""
    own, size = Path(sys.argv[0]), rank_and_size()[1]
    if size > 1 and command == "train":
        here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        several = "" if here == size else f"--nnodes {size // here} … "
        return f"torchrun {several}--nproc_per_node {here} {shlex.quote(str(own))}"
    if own.name in SCRIPTS:
        return f"python {shlex.quote(str(own.with_name(f'{command}.py')))}"
    return f"{'python -m ' * _is_module()}bertpair {command}"


def say(text: str) -> None:
    """A line on standard output, at once; BertpairError if it cannot be written. Nothing if it is closed,
    and from the first of several processes only."""
    if sys.stdout is None or rank_and_size()[0]:
        return
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # not every locale has every label
    try:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        raise BertpairError(f"standard output cannot be written: {error.strerror}") from error


def configure_logging() -> None:
    """Log lines of the library from INFO upwards go to standard error; of other libraries, warnings only."""
    logging.basicConfig(level=logging.WARNING, handlers=[_AboveTheBar()], force=True)
    logging.getLogger("bertpair").setLevel(logging.INFO)


@contextmanager
def lines_shown() -> Iterator[None]:
    """Show the library's log lines in a program that has not configured logging."""
    package = logging.getLogger("bertpair")
    if package.hasHandlers():
        yield
        return
    handler, level = _AboveTheBar(), package.level
    package.addHandler(handler)
    if level == logging.NOTSET:
        package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)


def _in_notebook() -> bool:
    """Whether a Jupyter kernel runs this program."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and "IPKernelApp" in shell.config


def _screen() -> TextIO:
    """Where lines and the bar go. A notebook colours standard error like a fault."""
    return sys.stdout if _in_notebook() else sys.stderr


def _process_name() -> str:
    """What leads the lines of a process that is not the first: `process 1: `."""
    rank = rank_and_size()[0]
    return f"process {rank}: " if rank else ""


class _PlainFormatter(logging.Formatter):
    """The message alone; from WARNING upwards with the level before it."""

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return f"{_process_name()}{level}{message}"


class _AboveTheBar(logging.StreamHandler[TextIO]):
    """Writes a line above a progress bar, if one is shown, not through it.

    Of several processes the first says all; the others only warn, and not of what the first one sees too.
    """

    def __init__(self) -> None:
        super().__init__(_screen())
        self.setFormatter(_PlainFormatter("%(message)s"))
        if rank_and_size()[0]:
            self.setLevel(logging.WARNING)
            self.addFilter(lambda record: not record.name.startswith(SEEN_BY_ALL))

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


class LogWriter(logging.Handler):
    """Writes to an open descriptor, in order, on a thread of its own: nobody who logs waits for a reader.

    Lines that find the queue full, or cannot be written, are dropped and counted. One line says so, and one
    how many they were; `place` names the descriptor in them.
    """

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


class Progress:
    """Counts units of work. In a terminal or a notebook a bar with rate and time left; elsewhere only what
    `line` is told.

    Lines go through logging either way; our handler prints all lines above the bar.
    """

    def __init__(
        self, total: int | None, unit: str, *, initial: int = 0, label: str = "", transient: bool = False
    ) -> None:
        self._left, self._num_done = (total or 0) - initial, 0
        self._started = time.monotonic()
        bar: dict[str, Any] = {"total": total, "initial": initial, "unit": unit, "desc": label or None}
        bar |= {"leave": not transient, "dynamic_ncols": True, "smoothing": 0.1}
        is_within = transient and bool(getattr(tqdm, "_instances", None))  # another bar: one line is enough
        is_shown = (sys.stderr.isatty() or (_in_notebook() and not is_within)) and not rank_and_size()[0]
        self._bar = _bar(bar) if is_shown else None

    @property
    def has_bar(self) -> bool:
        return self._bar is not None

    def advance(self, n: int = 1) -> None:
        """`n` more units are done."""
        self._num_done += n
        if self._bar is not None:
            self._bar.update(n)

    def show(self, **figures: str) -> None:
        """Put short figures at the end of the bar."""
        if self._bar is not None:
            self._bar.set_postfix(figures, refresh=False)

    def line(self, text: str) -> None:
        """Log one line; without a bar it carries the time left."""
        left = self._left - self._num_done
        if self._bar is None and self._num_done and left > 0:
            text += f", {format_seconds((time.monotonic() - self._started) / self._num_done * left)} left"
        logger.info("%s", text)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()


def _bar(options: dict[str, Any]) -> tqdm[Any]:
    with warnings.catch_warnings():  # in a notebook without ipywidgets the bar is text, as in a terminal
        warnings.simplefilter("ignore")
        from tqdm.auto import tqdm as best
    return best(**options, file=_screen())


def format_seconds(seconds: float) -> str:
    """A duration as people say it: 42 s, 3 min 05 s, 2 h 07 min."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
