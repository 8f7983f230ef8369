"""Texts and pairs of texts to the token ids of a BERT, in compact arrays.

Each chunk of rows is one parallel call into the `tokenizers` library, with its distinct texts only: a
reference answer that stands in a thousand rows is tokenized once. Special tokens and truncation are put on
in numpy, by the rule that transformers' `longest_first` has.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import normalizers

from bertpair.console import stop_flag
from bertpair.data.wordpiece import MASK_TOKEN, entries_of, is_standard, read_wordpiece
from bertpair.errors import CheckpointError, ConfigError, DataError, half_character, list_faults

logger = logging.getLogger(__name__)

Ints = NDArray[np.int64]

CHUNK_ROWS = 20_000
CHUNK_CHARS = 4_000_000  # the library needs some 100 bytes a token while it works
HEAD_CHARS = 10  # per token of max_length: what is tokenized of a text that is far too long
MAX_SPARE_ROWS = 127  # rows of the word table beyond the vocabulary: padding to a round number
MAX_MODEL_LENGTH = 1_000_000  # transformers writes 1e30 for "none"


@dataclass(frozen=True)
class Tokens:
    """Rows of token ids, one after the other: row i is `ids[offsets[i]:offsets[i + 1]]`."""

    ids: NDArray[np.int32]  # (total,)
    offsets: Ints  # (n + 1,)
    first_lengths: NDArray[np.integer[Any]]  # (n,) [CLS] a [SEP]; the rest is token type 1
    truncated: NDArray[np.bool_]  # (n,)

    def __len__(self) -> int:
        return len(self.truncated)

    @property
    def lengths(self) -> Ints:
        return np.diff(self.offsets)


class Tokenizer:
    """WordPiece as BERT uses it; ids equal transformers' BertTokenizerFast's, but typed [SEP] stays text."""

    def __init__(self, backend: tokenizers.Tokenizer, lower_case: bool, settings: Mapping[str, Any]) -> None:
        self.backend = backend
        self.lower_case = lower_case
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.pad_id, self.cls_id, self.sep_id, self.unk_id = (
            vocabulary[token] for token in ("[PAD]", "[CLS]", "[SEP]", "[UNK]")
        )
        length = settings.get("model_max_length")
        self.model_max_length = (
            int(length) if isinstance(length, int | float) and 0 < length <= MAX_MODEL_LENGTH else None
        )
        self._is_standard = is_standard(backend)
        # Where a text can be cut without changing a token before: BERT's pipeline ends a word in front of
        # these, whatever follows; only added tokens could reach across.
        self._boundary = None
        if self._is_standard and all(t.special for t in backend.get_added_tokens_decoder().values()):
            chinese = "\u4e00-\u9fff" if backend.normalizer.handle_chinese_chars else ""
            self._boundary = re.compile(f"[ \n{chinese}]")

    @classmethod
    def from_folder(
        cls, folder: Path, *, do_lower_case: bool | None = None, word_table: int | None = None
    ) -> Tokenizer:
        """Read tokenizer.json or vocab.txt; `word_table` is the number of rows that the model has for them.

        Raises CheckpointError on a tokenizer that is missing, damaged, contradictory or of another size.
        """
        tokenizer = cls(*read_wordpiece(folder, do_lower_case))
        size = tokenizer.vocab_size
        if word_table is not None and size != word_table:
            what = f"{folder}: a vocabulary of {size} entries for a word table of {word_table} rows"
            if not 0 <= word_table - size <= MAX_SPARE_ROWS:
                raise CheckpointError(
                    f"{what}; it may not be longer, and it may be at most {MAX_SPARE_ROWS} shorter"
                )
            logger.info("%s", what)
        return tokenizer

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.backend.encode_special_tokens = True  # copies and pickles of the library's object forget it

    @cached_property
    def fingerprint(self) -> str:
        """Equal for tokenizers that give equal ids (under one version of the tokenizers library)."""
        content = self.backend.to_str() + f"\nlower_case={self.lower_case}"
        return hashlib.sha256(content.encode()).hexdigest()

    def encode(self, text_a: Sequence[str], text_b: Sequence[str] | None, max_length: int) -> Tokens:
        """Token ids of each row: [CLS] a [SEP] b [SEP], or [CLS] a [SEP] without text_b.

        Rows longer than `max_length` lose tokens from the end of the longer text. Raises DataError on text
        that UTF-8 cannot carry, ConfigError where max_length leaves no token for each text, StoppedError
        between chunks.
        """
        columns = [text_a] if text_b is None else [text_a, text_b]
        faults = [
            f"{name}[{row}]: character {at} is {text[at]!r}, half of a surrogate pair"
            for name, column in zip(("text_a", "text_b"), columns, strict=False)
            for row, text in enumerate(column)
            if (at := half_character(text)) is not None
        ]
        if faults:
            raise DataError(list_faults(faults))
        check_max_length(max_length, num_texts=len(columns))
        ids = bytearray()  # grows in place; joining arrays at the end would need the memory twice
        lengths, first_lengths, truncated = [], [], []
        for rows in chunks(columns):
            stop_flag.raise_if_set()
            part = self._encode_chunk([column[rows] for column in columns], max_length)
            ids += part.ids.tobytes()
            lengths.append(part.lengths)
            first_lengths.append(part.first_lengths)
            truncated.append(part.truncated)
        return Tokens(
            ids=np.frombuffer(ids, np.int32),
            offsets=offsets_of(np.concatenate(lengths)),
            first_lengths=np.concatenate(first_lengths),
            truncated=np.concatenate(truncated),
        )

    def _encode_chunk(self, columns: Sequence[Sequence[str]], max_length: int) -> Tokens:
        numbers: dict[str, int] = {}  # distinct text -> its number
        rows = [
            np.fromiter((numbers.setdefault(text, len(numbers)) for text in column), np.int64, len(column))
            for column in columns
        ]
        room = max_length - 1 - len(columns)
        flat, starts, counts = self._encode_distinct(list(numbers), rows, max_length)
        found = [counts[row] for row in rows]
        kept = longest_first(found[0], found[1], room) if len(rows) == 2 else [np.minimum(found[0], room)]
        offsets = offsets_of(np.sum(kept, axis=0) + 1 + len(rows))
        ids = np.full(offsets[-1], self.sep_id, np.int32)  # what nothing is copied to stays [SEP]
        ids[offsets[:-1]] = self.cls_id
        at = offsets[:-1] + 1
        for row, keep in zip(rows, kept, strict=True):
            copy_runs(ids, at, flat, starts[row], keep)
            at = at + keep + 1
        small: type[np.integer[Any]] = np.uint16 if max_length <= np.iinfo(np.uint16).max else np.int32
        return Tokens(ids, offsets, (kept[0] + 2).astype(small), np.sum(found, axis=0) > room)

    def _encode_distinct(
        self, texts: list[str], rows: Sequence[Ints], max_length: int
    ) -> tuple[NDArray[np.int32], Ints, Ints]:
        """The texts' ids end to end, where each begins, and how many tokens each has.

        Of a text far beyond max_length only a head is tokenized where its tokens decide the row.
        """
        room = max_length - 1 - len(rows)
        heads = [self._head(text, HEAD_CHARS * max_length) for text in texts]
        encodings = self.backend.encode_batch_fast(heads, add_special_tokens=False)
        counts = np.fromiter(map(len, encodings), np.int64, len(encodings))
        is_cut = np.fromiter((h is not t for h, t in zip(heads, texts, strict=True)), np.bool_, len(texts))
        undecided = np.flatnonzero(undecided_heads(is_cut, counts, rows, room))
        whole = self.backend.encode_batch_fast([texts[i] for i in undecided], add_special_tokens=False)
        for i, encoding in zip(undecided, whole, strict=True):
            encodings[i] = encoding
            counts[i] = len(encoding)
        used = np.minimum(counts, room)
        ids = itertools.chain.from_iterable(encoding.ids[:room] for encoding in encodings)
        flat = np.fromiter(ids, np.int32, used.sum())
        return flat, offsets_of(used)[:-1], counts

    def _head(self, text: str, length: int) -> str:
        """The text itself, or a beginning of about `length` characters whose tokens are the text's first."""
        if len(text) <= 2 * length or self._boundary is None:
            return text
        match = self._boundary.search(text, length)
        return text[: match.start()] if match else text

    def files(self, max_length: int) -> dict[str, bytes]:
        """The tokenizer as files by name, which transformers' AutoTokenizer loads too."""
        specials = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]"}
        # Left out, transformers would add a [MASK] beyond the vocabulary.
        mask = MASK_TOKEN if self.backend.token_to_id(MASK_TOKEN) is not None else None
        settings: dict[str, object] = {
            "tokenizer_class": "BertTokenizer" if self._is_standard else "PreTrainedTokenizerFast",
            "model_max_length": max_length,
            "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
            "do_lower_case": self.lower_case,
            **specials,
            "mask_token": mask,
        }
        normalizer = self.backend.normalizer
        if isinstance(normalizer, normalizers.BertNormalizer):
            settings["strip_accents"] = normalizer.strip_accents
            settings["tokenize_chinese_chars"] = normalizer.handle_chinese_chars
        return {
            "tokenizer.json": self.backend.to_str().encode(),
            "tokenizer_config.json": _to_json(settings),
            "special_tokens_map.json": _to_json(specials | ({"mask_token": mask} if mask else {})),
            "vocab.txt": "".join(entry + "\n" for entry in entries_of(self.backend)).encode(),
        }


def _to_json(value: object) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()


def check_max_length(max_length: int, num_texts: int) -> None:
    """ConfigError where it leaves no token for each text."""
    least = 1 + 2 * num_texts
    if max_length < least:
        what = "a pair ([CLS] a [SEP] b [SEP])" if num_texts == 2 else "a single text ([CLS] a [SEP])"
        raise ConfigError(f"max_seq_length is {max_length}; {what} needs {least} at least")


def chunks(columns: Sequence[Sequence[str]]) -> Iterator[slice]:
    """Slices of at most CHUNK_ROWS rows and (one long row aside) CHUNK_CHARS characters; no rows: one."""
    num_rows = len(columns[0])
    chars = np.zeros(num_rows + 1, np.int64)
    for column in columns:
        chars[1:] += np.fromiter(map(len, column), np.int64, num_rows)
    np.cumsum(chars, out=chars)
    start = 0
    while start < num_rows or start == 0:
        fitting = int(np.searchsorted(chars, chars[start] + CHUNK_CHARS, side="right")) - 1
        stop = min(max(fitting, start + 1), start + CHUNK_ROWS, num_rows)
        yield slice(start, stop)
        start = max(stop, 1)


def longest_first(first: Ints, second: Ints, room: int) -> list[Ints]:
    """How many tokens of each text stay: the longer one loses tokens until both fit or are equally long.

    An odd token more goes to the longer text, among equals to the second.
    """
    half = room // 2
    shorter = np.minimum(first, second)
    long = np.where(shorter <= half, room - shorter, room - half)
    short = np.minimum(shorter, half)
    is_cut, is_longer = first + second > room, first > second
    return [
        np.where(is_cut, np.where(is_longer, long, short), first),
        np.where(is_cut, np.where(is_longer, short, long), second),
    ]


def undecided_heads(
    is_cut: NDArray[np.bool_], counts: Ints, rows: Sequence[Ints], room: int
) -> NDArray[np.bool_]:
    """Which texts have to be tokenized whole: too few tokens, or open which text of some pair is the longer.

    `counts` are those of the heads where `is_cut`; `rows` has each column's text numbers, row by row.
    """
    undecided = counts <= room
    if len(rows) == 2:
        a, b = rows
        a_open = is_cut[a] & (is_cut[b] | (counts[b] >= counts[a]))
        b_open = is_cut[b] & (is_cut[a] | (counts[a] >= counts[b]))
        undecided[a[a_open]] = True
        undecided[b[b_open]] = True
    return undecided & is_cut


def offsets_of(lengths: Ints) -> Ints:
    """Where runs of these lengths begin when they stand end to end, and where the last one ends."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def copy_runs(
    target: NDArray[np.int32], to: Ints, source: NDArray[np.int32], start: Ints, length: Ints
) -> None:
    """`target[to[i] : to[i] + length[i]] = source[start[i] : start[i] + length[i]]` for all i at once."""
    within = np.arange(length.sum()) - np.repeat(offsets_of(length)[:-1], length)
    target[np.repeat(to, length) + within] = source[np.repeat(start, length) + within]
