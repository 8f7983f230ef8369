"""What the scripts share: plain log lines on standard error, signals, and errors turned into exit codes.

0 done; 1 a defect of ours (its traceback), or a run whose last save failed; 2 the user's error;
128 + signal number after SIGINT (130) and SIGTERM (143).
"""

import logging
import sys
from collections.abc import Callable
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


def run_script(main: Callable[[], int]) -> int:
    """Run `main` and return the exit code; only what the user can put right becomes one line."""
    configure_logging()
    install_signal_handlers()
    try:
        return main()
    except StoppedError as stopped:
        sys.stderr.write(f"{stopped}\n")
        return 1 if stopped.save_failed else 128 + stopped.signum
    except BertpairError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
