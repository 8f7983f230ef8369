"""What a user can get wrong, as a small tree.

BertpairError                 scripts print `error: …` and exit with 2; anything else is a defect of ours
├── ConfigError               a setting: unknown, of the wrong type, out of range, contradicting another
├── DataError                 a row, a file or a set of labels
├── CheckpointError           a model folder or checkpoint: missing, damaged, of another shape
├── TrainingError             a run that cannot go on: too many steps with numbers that are not finite
├── ElsewhereError            another process of the run raised one of these, and says it
└── StoppedError              not a fault: the stop flag was seen; scripts exit with 128 + signal number
"""

import difflib
import signal
from collections.abc import Iterable, Mapping, Sequence


class BertpairError(Exception):
    """Something the user can put right; the message says where, what was found and what is allowed."""


class ConfigError(BertpairError):
    """A setting is unknown, has the wrong type, is out of range, or contradicts another."""


class DataError(BertpairError):
    """A row, a data file or a set of labels cannot be used."""


class CheckpointError(BertpairError):
    """A model folder or a checkpoint is missing, damaged, or does not fit what was asked."""


class TrainingError(BertpairError):
    """A run cannot go on; its last whole checkpoint stands."""


class ElsewhereError(BertpairError):
    """Another process of this run cannot go on, and says why; scripts add nothing."""


class StoppedError(BertpairError):
    """Not a fault: a signal asked the program to stop; `what_next` says what became of the work.

    Scripts exit with 128 + `signum`; with 1 if the checkpoint that should keep the work `save_failed`.
    """

    def __init__(self, signum: int, what_next: str = "", *, save_failed: bool = False) -> None:
        name = "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name
        super().__init__(f"stopped by {name}" + (f": {what_next}" if what_next else ""))
        self.signum, self.save_failed = signum, save_failed


def list_faults(faults: Sequence[str], total: int | None = None, limit: int = 10) -> str:
    """Join up to `limit` faults, one a line, and say how many more there are (of `total`, default all)."""
    rest = (len(faults) if total is None else total) - len(faults[:limit])
    return "\n".join([*faults[:limit], *([f"… and {rest} more"] if rest > 0 else [])])


def raise_faults(faults: Sequence[str]) -> None:
    """ConfigError with all of them, if there are any."""
    if faults:
        raise ConfigError(list_faults(faults))


def first_line(error: BaseException) -> str:
    """What an error says, up to its first line's end; the name of its class where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def show(value: object) -> str:
    """A value as a message shows it: short, and on one line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping | list | tuple | set | frozenset):
        return "a mapping" if isinstance(value, Mapping) else "a list"
    try:
        text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    except ValueError:  # Python refuses to print integers of more than 4300 digits
        text = "a very long number"
    return text if len(text) <= 62 else f"{text[:61]}…{text[-1]}"


def plain(name: str) -> str:
    """A name as a message shows it: bare if that can be read."""
    return name if name.isprintable() and 0 < len(name) <= 60 else show(name)


def listed(values: Sequence[object], limit: int = 20) -> str:
    """Values for a message, with a count of those beyond the limit."""
    more = f" and {len(values) - limit} more" if len(values) > limit else ""
    return ", ".join(map(show, values[:limit])) + more


def near_misses(word: str, known: Iterable[str]) -> list[str]:
    """The known words that were probably meant: up to three that begin so, else the one most like it."""
    by_key = {_key(each): each for each in sorted(known)}
    key = _key(word)
    begun = [each for each_key, each in by_key.items() if len(key) >= 3 and each_key.startswith(key)]
    return begun[:3] or [by_key[near] for near in difflib.get_close_matches(key, by_key, n=1)]


def _key(word: str) -> str:
    return word.strip("- ")[:100].replace("-", "_").lower()


def half_character(text: str) -> int | None:
    """Where a text holds half of a surrogate pair, which no UTF-8 can carry; None where it does not."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None
