"""Pairs → token ids and targets; what looks wrong with the labels; a cache of token ids.

The cache keeps one file an entry, keyed by the content of the texts, the tokenizer and the settings. It is
written beside its final name and renamed, with a checksum inside: an entry that is damaged, half-written or
of another version is made anew, and a folder that cannot be written costs a warning.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
import re
import tempfile
import time
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from bertpair.data.records import without_invisible
from bertpair.data.tokenizer import Tokenizer, Tokens
from bertpair.errors import listed, plain, show

logger = logging.getLogger(__name__)

MANY_UNKNOWN = 0.1  # of the tokens; real text in a vocabulary's own languages stays under 0.01

Targets = npt.NDArray[np.int64] | npt.NDArray[np.float32]
MAX_SHOWN = 20  # labels in one line
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d{1,3})?")
_DECIMAL_COMMA = re.compile(r"([-+]?\d+),(\d+)")


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """Rows in the files' order; row i is line `line_of_row[i]` (from 1) of `files[file_of_row[i]]`."""

    text_a: list[str]
    text_b: list[str] | None
    labels: list[str] | None
    files: tuple[str, ...]
    file_of_row: npt.NDArray[np.int32]
    line_of_row: npt.NDArray[np.int32]
    header: tuple[str, ...] | None  # of the first file; None: it has none

    def __len__(self) -> int:
        return len(self.text_a)

    def where(self, row: int) -> str:
        """`train.tsv:17`"""
        return f"{self.files[self.file_of_row[row]]}:{self.line_of_row[row]}"


@dataclasses.dataclass(frozen=True)
class Split:
    """One data set, ready for the model: row i of `pairs`, `tokens` and `targets` are the same row."""

    pairs: Pairs
    tokens: Tokens
    targets: Targets | None  # int64 label ids or float32 values; None for a file without labels

    def __len__(self) -> int:
        return len(self.tokens)


@dataclasses.dataclass(frozen=True)
class Encoder:
    """How texts become token ids: the tokenizer, the cut, and where finished work is kept.

    `cache_dir` None is the user's cache folder; `overwrite_cache` makes each entry anew.
    """

    tokenizer: Tokenizer
    max_length: int
    cache_dir: Path | None = None
    overwrite_cache: bool = False

    def split(self, pairs: Pairs, labels: Sequence[str] | None, *, name: str) -> Split:
        """Encode `pairs`; `labels` in id order, None for regression. Says how many rows were cut."""
        tokens = self.encode(pairs.text_a, pairs.text_b)
        lengths, cut = tokens.lengths, int(tokens.truncated.sum())
        said = "%s: %d rows, %.1f tokens a row (longest %d); %d rows (%.1f %%) cut at %d"
        share = 100 * cut / len(lengths)
        logger.info(said, name, len(lengths), lengths.mean(), lengths.max(), cut, share, self.max_length)
        words = np.isin(tokens.ids, (self.tokenizer.cls_id, self.tokenizer.sep_id), invert=True).sum()
        unknown = int((tokens.ids == self.tokenizer.unk_id).sum())
        if unknown > MANY_UNKNOWN * words:
            logger.warning(
                "%s: %.0f %% of the tokens are [UNK], which tells the model nothing of the text: "
                "the vocabulary is not one for these texts",
                name,
                100 * unknown / words,
            )
        return Split(pairs, tokens, _targets(pairs.labels, labels))

    def encode(self, text_a: Sequence[str], text_b: Sequence[str] | None) -> Tokens:
        """What `tokenizer.encode` gives, from the cache where it has it. Raises what that raises."""
        columns = [text_a] if text_b is None else [text_a, text_b]
        if sum(sum(map(len, column)) for column in columns) < MIN_CHARS:
            return self.tokenizer.encode(text_a, text_b, self.max_length)
        folder = self.cache_dir or default_cache_dir()
        path = folder / f"tokens-{_entry_key(self.tokenizer, columns, self.max_length)}.safetensors"
        tokens = None if self.overwrite_cache else _read_entry(path, len(text_a))
        if tokens is None:
            tokens = self.tokenizer.encode(text_a, text_b, self.max_length)
            _write_entry(path, tokens)
        return tokens


def _targets(found: Sequence[str] | None, labels: Sequence[str] | None) -> Targets | None:
    """Class ids by the position in `labels`; with None, the labels as numbers."""
    if found is None:
        return None
    if labels is None:
        return np.array([float(label) for label in found], dtype=np.float32)
    ids = {label: number for number, label in enumerate(labels)}
    return np.array([ids[label] for label in found], dtype=np.int64)


def report_labels(name: str, pairs: Pairs, labels: Sequence[str] | None) -> None:
    """Log how many rows each label has, in id order, and warn where only one occurs."""
    if labels is None or pairs.labels is None:
        return
    counts = Counter(pairs.labels)
    shown = [f"{plain(label)} {counts[label]:,}" for label in labels[:MAX_SHOWN]]
    more = [f"and {len(labels) - MAX_SHOWN} more"] if len(labels) > MAX_SHOWN else []
    logger.info("%s labels: %s", name, ", ".join([*shown, *more]))
    if len(counts) == 1:
        logger.warning(
            "%s: all %s rows have the label %s", name, f"{len(pairs):,}", plain(next(iter(counts)))
        )


def label_warnings(labels: Sequence[str]) -> list[str]:
    """Lines about labels that are probably meant to be one, and about scores taken for labels."""
    alike: dict[str | float, list[str]] = {}
    for label in labels:
        alike.setdefault(_meant(label), []).append(label)
    twins = [" and ".join(map(_spelt, group)) for group in alike.values() if len(group) > 1]
    warnings = []
    if twins:
        more = [f"and {len(twins) - MAX_SHOWN} more"] if len(twins) > MAX_SHOWN else []
        shown = "; ".join([*twins[:MAX_SHOWN], *more])
        warnings.append(f"labels that look alike and are trained apart: {shown}")
    if missing := [label for label in labels if label.lower() == "nan"]:
        warnings.append(f"the label {missing[0]!r} is how pandas writes a missing one; is it meant?")
    numbers = [value for value in alike if isinstance(value, float)]
    if len(numbers) == len(alike) and (len(numbers) > 10 or not all(n.is_integer() for n in numbers)):
        warnings.append(
            f"all {len(labels)} labels are numbers ({listed(labels, 5)}); "
            "if they are scores, set problem_type: regression"
        )
    return warnings


def _meant(label: str) -> str | float:
    """Equal for labels that a person would take for the same."""
    text = without_invisible(unicodedata.normalize("NFKC", label)).casefold()
    text = _DECIMAL_COMMA.sub(r"\1.\2", text) if _DECIMAL_COMMA.fullmatch(text) else text
    return float(text) if _NUMBER.fullmatch(text) else unicodedata.normalize("NFKC", text)


def _spelt(label: str) -> str:
    """A label so that it can be told from one that looks the same."""
    is_seen = without_invisible(label) == label.replace(" ", "") and unicodedata.is_normalized("NFC", label)
    return show(label) if is_seen else ascii(label)


def overlap_warnings(train: Pairs, dev: Pairs | None, *, regression: bool = False) -> list[str]:
    """Lines that count dev rows that also stand in train, and texts that stand with two labels."""
    warnings: list[str] = []
    first: dict[tuple[str, str], str | float] = {}  # the label where these texts stand first
    for kind, pairs in (("training", train), ("dev", dev)):
        if pairs is None:
            continue
        keys = list(zip(pairs.text_a, pairs.text_b or pairs.text_a, strict=True))
        shared = [row for row, key in enumerate(keys) if key in first]
        if shared:
            warnings.append(
                f"dev rows that also stand in the training data: {len(shared):,} of {len(pairs):,}, "
                f"as at {pairs.where(shared[0])}; the dev figures flatter the model"
            )
        first = {}
        again: dict[tuple[str, str], int] = {}
        for row, (key, label) in enumerate(zip(keys, pairs.labels or (), strict=True)):
            meant = float(label) if regression else label  # 5.0 and 5.000 are one score
            if first.setdefault(key, meant) != meant:
                again.setdefault(key, row)
        if again:
            what = f"texts with more than one label in the {kind} data: {len(again):,}"
            warnings.append(f"{what}, as at {pairs.where(min(again.values()))}")
    return warnings


VERSION = "2"  # of the file's layout, part of the key
MAX_BYTES = 2 * 2**30
MIN_CHARS = 100_000
ABANDONED_SECONDS = 24 * 3600  # a temporary file this old belongs to no living writer
HASH_ROWS = 10_000
ENTRY_PATTERN = "tokens-" + "[0-9a-f]" * 64 + ".safetensors"  # the folder may hold what is not ours
TEMPORARY_PATTERN = "tokens-????????????????-*.tmp"
FIELDS = ("ids", "offsets", "first_lengths", "truncated")


def default_cache_dir() -> Path:
    """`bertpair/tokens` under XDG_CACHE_HOME (if absolute, as its specification says) or ~/.cache."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():
        try:
            base = Path.home() / ".cache"
        except RuntimeError:  # no home folder: nowhere to write, which is a warning when it comes to that
            base = Path(os.devnull)
    return base / "bertpair" / "tokens"


def _entry_key(tokenizer: Tokenizer, columns: Sequence[Sequence[str]], max_length: int) -> str:
    """sha256 over all that the ids depend on: texts, tokenizer, version of the library, settings."""
    settings = (VERSION, tokenizers.__version__, tokenizer.fingerprint, max_length, len(columns))
    digest = hashlib.sha256(repr(settings).encode())
    for column in columns:
        digest.update(len(column).to_bytes(8, "little"))
        for start in range(0, len(column), HASH_ROWS):
            rows = column[start : start + HASH_ROWS]
            # The lengths keep ("ab", "c") apart from ("a", "bc").
            digest.update(np.fromiter(map(len, rows), "<i8", len(rows)).tobytes())
            digest.update("".join(rows).encode())
    return digest.hexdigest()


def _read_entry(path: Path, num_rows: int) -> Tokens | None:
    """The entry's tokens; None if it is not there or not whole."""
    try:
        with safe_open(path, framework="np") as file:
            said = (file.metadata() or {}).get("sha256")
            arrays = {name: file.get_tensor(name) for name in FIELDS}
        if said != _checksum(arrays) or len(arrays["truncated"]) != num_rows:
            raise ValueError("damaged: wrong checksum")
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, ValueError) as e:
        logger.warning("%s: this token cache entry cannot be used (%s); it is made anew", path, e)
        return None
    with contextlib.suppress(OSError):  # in a read-only cache an entry's age stays as it is
        os.utime(path)
    return Tokens(**arrays)


def _write_entry(path: Path, tokens: Tokens) -> None:
    """Store an entry whole or not at all, and prune the oldest; failing costs a warning."""
    arrays = {name: np.ascontiguousarray(getattr(tokens, name)) for name in FIELDS}
    if sum(array.nbytes for array in arrays.values()) > MAX_BYTES:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f"{path.stem[:23]}-", suffix=".tmp", dir=path.parent)
        os.close(handle)
        try:
            save_file(arrays, name, metadata={"sha256": _checksum(arrays)})
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        _prune(path.parent, newest=path)
    except (OSError, SafetensorError) as e:
        logger.warning("token cache %s cannot be written (%s); going on without it", path.parent, e)


def _checksum(arrays: Mapping[str, npt.NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        digest.update(array.data)
    return digest.hexdigest()


def _prune(folder: Path, newest: Path) -> None:
    """Remove the entries used longest ago beyond MAX_BYTES, and what killed writers left."""
    for path in folder.glob(TEMPORARY_PATTERN):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                path.unlink()
    found: list[tuple[bool, float, int, Path]] = []
    for path in folder.glob(ENTRY_PATTERN):
        with contextlib.suppress(OSError):  # other processes prune too
            state = path.stat()
            found.append((path == newest, state.st_mtime, state.st_size, path))
    total = 0
    for *_, size, path in sorted(found, reverse=True):
        total += size
        if total > MAX_BYTES:
            with contextlib.suppress(OSError):
                path.unlink()
