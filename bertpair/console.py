"""What the scripts share: standard streams, log lines, signals, and errors turned into exit codes.

0 done; 1 a defect of ours (its traceback), or a run whose last save failed; 2 the user's error;
128 + signal number after SIGINT (130) and SIGTERM (143).
"""

import io
import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

from tqdm import tqdm

from bertpair.errors import BertpairError, StoppedError
from bertpair.runtime import install_signal_handlers


class _PlainFormatter(logging.Formatter):
    """The message alone; from WARNING upwards with the level before it."""

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        return f"{record.levelname.lower()}: {message}" if record.levelno >= logging.WARNING else message


class _AboveTheBar(logging.StreamHandler[TextIO]):
    """Writes a line above a progress bar, if one is shown, not through it."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=sys.stderr):
            super().emit(record)


def configure_logging() -> None:
    """Log lines of the library from INFO upwards go to standard error; of other libraries, warnings only."""
    handler = _AboveTheBar(sys.stderr)
    handler.setFormatter(_PlainFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("bertpair").setLevel(logging.INFO)


def say(text: str) -> None:
    """A line on standard output, at once; BertpairError if it cannot be written. Nothing if it is closed."""
    if sys.stdout is None:
        return
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # not every locale has every label
    try:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        raise BertpairError(f"standard output cannot be written: {error.strerror}") from error


def run_script(main: Callable[[], int]) -> int:
    """Run `main` and return the exit code; only what the user can put right becomes one line."""
    fill_descriptors()
    configure_logging()
    install_signal_handlers()
    try:
        return main()
    except StoppedError as stopped:
        _complain(str(stopped))
        return 1 if stopped.save_failed else 128 + stopped.signum
    except BertpairError as error:
        _complain(f"error: {error}")
        return 2


def fill_descriptors() -> None:
    """Streams that were closed for us lead nowhere: no file or socket of ours must take their numbers."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")


def _complain(line: str) -> None:
    with suppress(OSError):  # there is nowhere else to say it
        sys.stderr.write(f"{line}\n")
