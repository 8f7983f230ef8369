"""Texts and pairs of texts to token ids, in compact arrays.

The `tokenizers` library cuts rows (`longest_first`) and puts on special tokens and token types, chunk by
chunk in parallel.
"""

from __future__ import annotations

import json
import logging
from array import array
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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

CHUNK_ROWS = 5_000
CHUNK_CHARS = 1_000_000  # the library needs some 100 bytes a token while it works
LONG_BYTES = 8  # per token of max_length: a text with more is first cut to a head
MAX_SPARE_ROWS = 127  # rows of the word table beyond the vocabulary: padding to a round number
MAX_MODEL_LENGTH = 1_000_000  # transformers writes 1e30 for "none"


@dataclass(frozen=True)
class Tokens:
    """Rows of token ids, one after the other: row i is `ids[offsets[i]:offsets[i + 1]]`."""

    ids: NDArray[np.int32]  # (total,)
    offsets: Ints  # (n + 1,)
    first_lengths: NDArray[np.integer[Any]]  # (n,) tokens of type 0; the rest is of type 1
    truncated: NDArray[np.bool_]  # (n,)

    def __len__(self) -> int:
        return len(self.truncated)

    @property
    def lengths(self) -> Ints:
        return np.diff(self.offsets)


class Tokenizer:
    """WordPiece as BERT uses it; ids equal transformers' BertTokenizerFast's, but typed [SEP] stays text."""

    def __init__(self, backend: tokenizers.Tokenizer, lower_case: bool, settings: Mapping[str, Any]) -> None:
        backend.encode_special_tokens = True  # copies and pickles of the library's object forget it
        self.backend = backend
        self.lower_case = lower_case
        self.settings = settings
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.pad_id, self.unk_id = vocabulary["[PAD]"], vocabulary["[UNK]"]
        length = settings.get("model_max_length")
        self.model_max_length = (
            int(length) if isinstance(length, int | float) and 0 < length <= MAX_MODEL_LENGTH else None
        )
        self._cutter = backend, 0  # see `_cutting_at`
        self._reach = 1 + max(map(len, (t.content for t in backend.get_added_tokens_decoder().values())))

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self.backend, self.lower_case, self.settings)

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

    def check_length(self, max_length: int, num_texts: int) -> None:
        """ConfigError where it leaves no token for each text."""
        least = self.backend.num_special_tokens_to_add(num_texts == 2) + num_texts
        if max_length < least:
            row = self.backend.encode("a", "b" if num_texts == 2 else None).tokens
            what = f"a {'pair' if num_texts == 2 else 'single text'} ({' '.join(row)})"
            raise ConfigError(f"max_seq_length is {max_length}; {what} needs {least} at least")

    def encode(self, text_a: Sequence[str], text_b: Sequence[str] | None, max_length: int) -> Tokens:
        """Token ids of each row, with special tokens: of a pair, or of a single text without text_b.

        Rows longer than `max_length` lose tokens from the end of the longer text. Raises DataError on text
        that UTF-8 cannot carry, ConfigError where max_length leaves no token for each text, StoppedError
        between chunks.
        """
        columns = [text_a] if text_b is None else [text_a, text_b]
        self.check_length(max_length, len(columns))
        cutter = self._cutting_at(max_length)

        def encode_part(part: slice) -> tuple[array[int], ...]:
            stop_flag.raise_if_set()
            rows = self._heads([column[part] for column in columns], max_length)
            ids, lengths, first_lengths, truncated = made = array("i"), array("q"), array("i"), array("b")
            for encoding in cutter.encode_batch_fast(rows if len(columns) == 2 else [a for (a,) in rows]):
                ids.fromlist(encoding.ids)
                lengths.append(len(encoding))
                first_lengths.append(encoding.type_ids.count(0))
                # Asked of full rows only: the answer is a copy of all that was cut off.
                truncated.append(len(encoding) == max_length and bool(encoding.overflowing))
            return made

        parts = chunks(columns)
        whole = array("i"), array("q"), array("i"), array("b")
        # Two at a time: one is read out here, while the library works on the other on all cores.
        try:
            with ThreadPoolExecutor(2) as pool:
                for made in map(encode_part, parts) if len(parts) < 2 else pool.map(encode_part, parts):
                    for so_far, more in zip(whole, made, strict=True):
                        so_far.extend(more)
        except UnicodeEncodeError:  # `_heads` encodes each text
            faults = [
                f"{name}[{row}]: character {at} is {text[at]!r}, half of a surrogate pair"
                for name, column in zip(("text_a", "text_b"), columns, strict=False)
                for row, text in enumerate(column)
                if (at := half_character(text)) is not None
            ]
            raise DataError(list_faults(faults)) from None
        ids, lengths, first_lengths, truncated = map(np.asarray, whole)
        small = np.uint16 if max_length <= np.iinfo(np.uint16).max else np.int32
        return Tokens(ids, offsets_of(lengths), first_lengths.astype(small), truncated.astype(np.bool_))

    def _cutting_at(self, max_length: int) -> tokenizers.Tokenizer:
        """A copy of the backend that cuts; set on the backend itself, that would be written with a model."""
        cutter, length = self._cutter
        if length != max_length:
            cutter = tokenizers.Tokenizer.from_str(self.backend.to_str())
            cutter.encode_special_tokens = True
            cutter.enable_truncation(max_length)
            self._cutter = cutter, max_length
        return cutter

    def _heads(self, columns: Sequence[Sequence[str]], max_length: int) -> list[tuple[str, ...]]:
        """The rows; texts that are far too long give way to heads from which the same rows are made.

        The library would make a row of each combination of pieces that it cuts off. A head is tried that may
        be too short to tell, then a longer one.
        """
        rows = list(zip(*columns, strict=True))
        room = max_length - self.backend.num_special_tokens_to_add(len(columns) == 2)
        size = first_size = LONG_BYTES * max_length
        pending = [i for i, row in enumerate(rows) if any(len(text.encode()) > size for text in row)]
        totals: dict[int, list[int]] = {}

        def count(some: list[int]) -> None:
            texts = [text for i in some for text in rows[i]]
            counts = map(len, self.backend.encode_batch_fast(texts, add_special_tokens=False))
            totals.update((i, [next(counts) for _ in rows[i]]) for i in some)

        # Which of two long texts has more tokens, only their ends can tell.
        count([i for i in pending if len(rows[i]) == 2 and min(map(len, rows[i])) > size])
        while pending:
            texts = [text[:size] for i in pending for text in rows[i]]
            encodings = iter(self.backend.encode_batch(texts, add_special_tokens=False))
            undecided = []
            for i in pending:
                begun = [next(encodings) for _ in rows[i]]
                heads = _heads_of_row(rows[i], begun, totals.get(i), size, room, self._reach)
                rows[i] = heads or rows[i]
                undecided += [] if heads else [i]
            if size > first_size:  # it may have few tokens: one endless word
                count([i for i in undecided if i not in totals])
            pending, size = undecided, 16 * size
        return rows

    def files(self, max_length: int) -> dict[str, bytes]:
        """The tokenizer as files by name, which transformers' AutoTokenizer loads too."""
        specials = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]"}
        # Left out, transformers would add a [MASK] beyond the vocabulary.
        mask = MASK_TOKEN if self.backend.token_to_id(MASK_TOKEN) is not None else None
        settings: dict[str, object] = {
            "tokenizer_class": "BertTokenizer" if is_standard(self.backend) else "PreTrainedTokenizerFast",
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


def _heads_of_row(
    texts: tuple[str, ...], begun: Sequence[Any], totals: list[int] | None, size: int, room: int, reach: int
) -> tuple[str, ...] | None:
    """Heads of whole words that are cut to the same row; None where more of the texts must be seen.

    `begun` are the encodings of the first `size` characters; their words may go on within the last `reach`.
    `totals` are the tokens of the whole texts, where known. Cutting asks which text has more (among equals,
    the second), so the heads must keep that.
    """
    wholes = [len(text) <= size for text in texts]
    counts = []  # of tokens that the whole text has too
    for encoding, is_whole in zip(begun, wholes, strict=True):
        count = len(encoding)
        while count and not is_whole:
            word = encoding.token_to_word(count - 1)
            if encoding.word_to_chars(word)[1] <= size - reach:
                break
            count = encoding.word_to_tokens(word)[0]
        counts.append(count)
    first, second = (totals or counts) if len(texts) == 2 else (0, 0)
    if first <= second and (totals or wholes[0] or len(texts) == 1):
        shorter_first = [0, 1][: len(texts)]
    elif second < first and (totals or wholes[1]):
        shorter_first = [1, 0]
    else:
        return None
    heads, wanted = list(texts), room + 1
    for i in shorter_first:
        if counts[i] >= wanted:
            word = begun[i].token_to_word(wanted - 1)
            heads[i] = texts[i][: begun[i].word_to_chars(word)[1]]
            wanted = begun[i].word_to_tokens(word)[1]
        elif not wholes[i] and (totals is None or totals[i] >= wanted):
            return None
        wanted += 1
    return tuple(heads)


def chunks(columns: Sequence[Sequence[str]]) -> list[slice]:
    """Slices of at most CHUNK_ROWS rows and, the last row aside, CHUNK_CHARS characters."""
    chars = np.sum([[len(text) for text in column] for column in columns], axis=0, dtype=np.int64).cumsum()
    parts = np.stack([np.arange(len(chars)) // CHUNK_ROWS, chars // CHUNK_CHARS])
    bounds = [*np.flatnonzero(np.diff(parts, prepend=-1).any(axis=0)).tolist(), len(chars)]
    return list(map(slice, bounds, bounds[1:]))


def offsets_of(lengths: Ints) -> Ints:
    """Where runs of these lengths begin when they stand end to end, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
