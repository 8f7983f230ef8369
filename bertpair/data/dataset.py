"""Pairs → token ids and targets; what looks wrong with the labels and the rows."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from bertpair.data.records import without_invisible
from bertpair.data.tokenizer import Tokenizer, Tokens
from bertpair.errors import listed, plain, show

logger = logging.getLogger(__name__)

MANY_UNKNOWN = 0.1  # of the tokens; real text in a vocabulary's own languages stays under 0.01

Rows = npt.NDArray[np.int64]
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
    groups: list[str] | None = None  # that the rows belong to, such as their questions; None: not read
    kept: dict[str, list[str]] | None = None  # the cells of further columns, by their names; None: not read

    def __len__(self) -> int:
        return len(self.text_a)

    def where(self, row: int) -> str:
        """`train.tsv:17`"""
        return f"{self.files[self.file_of_row[row]]}:{self.line_of_row[row]}"

    @property
    def digest(self) -> str:
        """sha256 of texts and labels, in order: the same for the same rows of another file."""
        columns = [column for column in (self.text_a, self.text_b, self.labels) if column is not None]
        return hashlib.sha256(json.dumps(columns).encode()).hexdigest()

    def take(self, rows: Rows) -> Pairs:
        """These rows, in this order."""
        a, b, labels, groups = (
            None if column is None else [column[row] for row in rows]
            for column in (self.text_a, self.text_b, self.labels, self.groups)
        )
        assert a is not None
        kept = self.kept and {name: [cells[row] for row in rows] for name, cells in self.kept.items()}
        places = self.file_of_row[rows], self.line_of_row[rows]
        return Pairs(a, b, labels, self.files, *places, self.header, groups, kept)


@dataclasses.dataclass(frozen=True)
class Split:
    """One data set, ready for the model: row i of `pairs`, `tokens` and `targets` are the same row."""

    pairs: Pairs
    tokens: Tokens
    targets: Targets | None  # int64 label ids or float32 values; None for a file without labels

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, rows: Rows) -> Split:
        """These rows, in this order."""
        targets = None if self.targets is None else self.targets[rows]
        return Split(self.pairs.take(rows), self.tokens.take(rows), targets)


def make_split(
    pairs: Pairs, labels: Sequence[str] | None, tokenizer: Tokenizer, max_length: int, *, name: str
) -> Split:
    """Encode `pairs`; `labels` in id order, None for regression. Says how many rows were cut."""
    tokens = tokenizer.encode(pairs.text_a, pairs.text_b, max_length)
    lengths, cut = tokens.lengths, int(tokens.truncated.sum())
    logger.info(
        "%s: %d rows, %.1f tokens a row (longest %d); %d rows (%.1f %%) cut at %d",
        *(name, len(lengths), lengths.mean(), lengths.max(), cut, 100 * cut / len(lengths), max_length),
    )
    template = tokenizer.pipeline.templates[pairs.text_b is not None]
    words = int(lengths.sum()) - len(tokens) * template.num_specials
    unknown = 0 if tokenizer.unk_id is None else int((tokens.ids == tokenizer.unk_id).sum())
    if unknown > MANY_UNKNOWN * words:
        logger.warning(
            "%s: %.0f %% of the tokens are %s, which tells the model nothing of the text: "
            "the vocabulary is not one for these texts",
            *(name, 100 * unknown / words, tokenizer.unk_token),
        )
    targets: Targets | None = None
    if pairs.labels is not None and labels is None:
        targets = np.array(list(map(float, pairs.labels)), dtype=np.float32)
    elif pairs.labels is not None and labels is not None:
        ids = {label: number for number, label in enumerate(labels)}
        targets = np.array([ids[label] for label in pairs.labels], dtype=np.int64)
    return Split(pairs, tokens, targets)


def report_labels(name: str, pairs: Pairs, labels: Sequence[str] | None) -> None:
    """Log how many rows each label has, in id order. Warn where there is only one, or one for most rows."""
    if labels is None or pairs.labels is None:
        return
    counts = Counter(pairs.labels)
    shown = [f"{plain(label)} {counts[label]:,}" for label in labels[:MAX_SHOWN]]
    more = [f"and {len(labels) - MAX_SHOWN} more"] if len(labels) > MAX_SHOWN else []
    logger.info("%s labels: %s", name, ", ".join([*shown, *more]))
    if len(counts) > max(MAX_SHOWN, len(pairs) // 2):
        found = f"{len(counts):,} different labels in {len(pairs):,} rows"
        logger.warning("%s: %s; does label_column name the right column?", name, found)
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
