"""Labelling rows window by window: `evaluate.py --predict`, for files of any size.

A window is a fixed number of rows of the files. It is read, scored, and its answers are appended to a file of
predictions; then `progress.json` says so. A run that was stopped goes on after the last whole window. Several
processes take turns at the windows, and the first one writes.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from bertpair.checkpoints import atomic
from bertpair.checkpoints.checkpoint import INPUT_FILE, PART_FILE, PROGRESS_FILE, writable, write_results
from bertpair.console import Progress
from bertpair.data.dataset import Pairs, make_split
from bertpair.data.tokenizer import Tokens
from bertpair.errors import BertpairError, CheckpointError, DataError, StoppedError
from bertpair.evaluation.classifier import PairClassifier, Prediction, make_predictions
from bertpair.evaluation.report import format_lines, format_predictions
from bertpair.processes import Processes
from bertpair.settings.files import read_json

logger = logging.getLogger(__name__)

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 30.0  # that say how far it is, where no bar shows it


@dataclasses.dataclass(frozen=True)
class Writing:
    """How answers are written."""

    as_json: bool  # predictions.jsonl instead of predictions.tsv
    with_texts: bool
    with_file: bool  # which of several files a row is of

    @property
    def file_name(self) -> str:
        return f"predictions.{'jsonl' if self.as_json else 'tsv'}"

    def lines(
        self, answers: Sequence[Prediction], pairs: Pairs, labels: Sequence[str] | None, *, is_first: bool
    ) -> bytes:
        """The lines of a window; the first one begins with the names of the columns."""
        how = {"with_texts": self.with_texts, "with_file": self.with_file}
        if self.as_json:
            return format_lines(answers, pairs, **how)
        return format_predictions(answers, pairs, labels, has_header=is_first, **how)


class Output:
    """The folder of one stream of answers, in the process that writes it.

    `identity` is whatever decides what the answers are, as JSON has it; None for a stream that cannot be read
    again. What was written for another identity is not gone on with.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any] | None) -> None:
        self.folder, self.identity, self.part = folder, identity, folder / PART_FILE
        self.windows = self.rows = 0  # that are whole

    def begin(self) -> dict[str, int]:
        """How many windows and rows an earlier run has written whole; where there is none to go on with, the
        folder is made ready for a new one."""
        found = self._earlier()
        if found is None:
            write_results(self.folder, {PART_FILE: b""})
        else:
            with writable(self.folder):
                atomic.cut(self.part, found["bytes"])
            self.windows, self.rows = found["windows"], found["rows"]
            logger.info("going on after row %s, where an earlier run ended", f"{self.rows:,}")
        return {"windows": self.windows, "rows": self.rows}

    def _earlier(self) -> dict[str, Any] | None:
        """What progress.json says, if it is of this identity and true."""
        try:
            found = read_json(self.folder / PROGRESS_FILE)
            known, now = found["identity"], self.identity or {}
            changed = [name for name in {**known, **now} if known.get(name) != now.get(name)]
            if changed:
                said = "%s: an earlier run was stopped here; it had another %s: starting anew"
                logger.info(said, self.folder, " and ".join(changed))
            is_whole = self.part.stat().st_size >= found["bytes"] and found["windows"] >= 0 <= found["rows"]
            return found if is_whole and not changed else None
        except (CheckpointError, OSError, LookupError, TypeError, AttributeError):
            return None

    def append(self, windows: list[bytes], num_rows: int) -> None:
        """Add whole windows, durably."""
        with writable(self.folder):
            atomic.append(self.part, b"".join(windows))
            length = atomic.durable_length(self.part)
            self.windows, self.rows = self.windows + len(windows), self.rows + num_rows
            if self.identity is not None:
                said = {
                    "identity": self.identity,
                    "windows": self.windows,
                    "rows": self.rows,
                    "bytes": length,
                }
                atomic.replace_file(self.folder / PROGRESS_FILE, json.dumps(said).encode())

    def finish(self, file_name: str, described: Mapping[str, Any]) -> None:
        """Give the file its name, and say beside it what it was made of."""
        said = json.dumps(described, indent=2, ensure_ascii=False) + "\n"
        write_results(self.folder, {INPUT_FILE: said.encode(errors="surrogateescape")}, adds=True)
        with writable(self.folder):
            atomic.rename(self.part, self.folder / file_name)
            (self.folder / PROGRESS_FILE).unlink(missing_ok=True)


def label_windows(
    model: PairClassifier,
    windows: Iterator[Pairs],
    num_rows: int | None,
    output: Output,
    writing: Writing,
    processes: Processes,
    name: str,
) -> int:
    """Write the answers for all windows; how many rows they are. `num_rows` None: not known before.

    Raises what reading raises, and StoppedError; whole windows are kept then. For all processes.
    """
    done = processes.share(output.begin() if processes.is_first else None)
    rows, began = int(done["rows"]), time.monotonic()
    told = began
    with Progress(num_rows, "row", initial=rows, label=name, transient=True) as progress:
        try:
            rounds = _rounds(windows, done["windows"], processes)
            for number, pairs, tokens, rows_of_round in _ahead(_encoded(rounds, model, num_rows, name)):
                lines = b""
                if pairs is not None and tokens is not None:
                    logits = model.scorer.logits(tokens, progress.advance)
                    answers = make_predictions(logits, tokens, model.labels, model.decision)
                    lines = writing.lines(answers, pairs, model.labels, is_first=number == 0)
                parts = processes.gather(lines)
                if processes.is_first:
                    output.append([part for part in parts if part], rows_of_round)
                progress.advance(rows_of_round - len(pairs or ()))
                rows += rows_of_round
                if not progress.has_bar and time.monotonic() - told > SECONDS_BETWEEN_LINES:
                    told = time.monotonic()
                    rate = (rows - done["rows"]) / (told - began)
                    progress.line(f"{name}: {rows:,} rows  {rate:,.0f} rows/s")
        except (StoppedError, DataError) as error:
            raise _with_what_is_kept(error, output, rows, num_rows) from None
    if num_rows is not None and num_rows != rows:
        raise DataError(f"{name}: the files had {num_rows:,} rows, and then {rows:,}: are they written to?")
    return rows


def _rounds(
    windows: Iterator[Pairs], first: int, processes: Processes
) -> Iterator[tuple[int, Pairs | None, int]]:
    """From window `first` on, `size` windows at a time: the number of this process's own and that window, or
    None where the last round has none for it; and how many rows the round has."""
    rank, size = processes.rank, processes.size
    own: tuple[int, Pairs | None] = first, None
    rows = turn = 0
    for number, pairs in enumerate(windows):
        if number < first:
            continue
        rows, turn = rows + len(pairs), (number - first) % size
        if turn == rank:
            own = number, pairs
        if turn == size - 1:
            yield *own, rows
            own, rows = (number + 1, None), 0
    if rows:
        yield *own, rows


def _encoded(
    rounds: Iterator[tuple[int, Pairs | None, int]], model: PairClassifier, num_rows: int | None, name: str
) -> Iterator[tuple[int, Pairs | None, Tokens | None, int]]:
    """The same with the token ids of the window. How long the rows are is said of the first one."""
    for number, pairs, rows in rounds:
        tokens = None
        if pairs is not None and number == 0:
            called = name if len(pairs) == num_rows else f"{name}, first window"
            tokens = make_split(pairs, None, model.tokenizer, model.max_seq_length, name=called).tokens
        elif pairs is not None:
            tokens = model.tokenizer.encode(pairs.text_a, pairs.text_b, model.max_seq_length)
        yield number, pairs, tokens, rows


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items; the next one is made while the last one is used."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item


def _with_what_is_kept(
    error: StoppedError | DataError, output: Output, num_done: int, num_rows: int | None
) -> BertpairError:
    """The same error, with what became of the rows before."""
    if output.identity is None:
        kept = f"the answers for the {num_done:,} rows before are in {output.part}"
    else:
        kept = f"{num_done:,} of {num_rows:,} rows are done; the same command goes on after them"
    if isinstance(error, StoppedError):
        return StoppedError(error.signum, kept)
    return DataError(f"{error}\n{kept}")
