"""Texts and pairs of texts to token ids, in compact arrays.

The `tokenizers` library turns texts into ids, chunk by chunk in parallel. Rows are cut and special tokens put
on here: the library would make a row of every combination of pieces that it cuts off.
"""

from __future__ import annotations

import json
import logging
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import models

from bertpair.console import stop_flag
from bertpair.data.pipeline import ROLES, Pipeline, read_pipeline
from bertpair.data.template import TRUNCATIONS, keep
from bertpair.data.wordpiece import entries_of, is_wordpiece, read_wordpiece
from bertpair.errors import CheckpointError, ConfigError, DataError, half_character, list_faults

logger = logging.getLogger(__name__)

Ints = NDArray[np.int64]

CHUNK_ROWS = 5_000
CHUNK_CHARS = 1_000_000  # the library needs some 100 bytes a token while it works
LONG_CHARS = 8  # per token that there is room for: of a text with more, a head is read first
REACH = 64  # a word that ends so far before the end of a head is whole: more than any pattern looks ahead
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

    def take(self, rows: Ints) -> Tokens:
        """These rows, in this order."""
        lengths = self.lengths[rows]
        offsets = offsets_of(lengths)
        within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
        ids = self.ids[np.repeat(self.offsets[rows], lengths) + within]
        return Tokens(ids, offsets, self.first_lengths[rows], self.truncated[rows])


class Tokenizer:
    """A model's own tokenizer; ids equal those of transformers' fast one, but typed [SEP] stays text."""

    def __init__(self, pipeline: Pipeline, truncation: str | None = None) -> None:
        """`truncation` None: as the model folder says."""
        self.pipeline, self.backend, self.lower_case = pipeline, pipeline.backend, pipeline.lower_case
        self.vocab_size = max(self.backend.get_vocab(with_added_tokens=True).values()) + 1
        pad_id = self.backend.token_to_id(pipeline.config["pad_token"])
        assert pad_id is not None  # who reads a pipeline sees to it
        self.pad_id = pad_id
        self.unk_token: str | None = pipeline.config["unk_token"]  # None: it has tokens for any text
        self.unk_id = None if self.unk_token is None else self.backend.token_to_id(self.unk_token)
        length = pipeline.config.get("model_max_length")
        self.model_max_length = (
            int(length) if isinstance(length, int | float) and 0 < length <= MAX_MODEL_LENGTH else None
        )
        if truncation not in (None, *TRUNCATIONS):
            raise ConfigError(f"truncation: found {truncation!r}; allowed: {', '.join(TRUNCATIONS)}")
        said = truncation or pipeline.config.get("truncation")  # which may be true, of another's writing
        self.truncation = said if said in TRUNCATIONS else "longest_first"
        added = self.backend.get_added_tokens_decoder().values()
        self._reach = REACH + max((len(token.content) for token in added), default=0)

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        *,
        do_lower_case: bool | None = None,
        word_table: int | None = None,
        truncation: str | None = None,
    ) -> Tokenizer:
        """Read the folder's tokenizer; `word_table` is the number of rows that the model has for its tokens.

        Raises CheckpointError on a tokenizer that is missing, damaged, contradictory or of another size.
        """
        read = read_wordpiece if is_wordpiece(folder) else read_pipeline
        tokenizer = cls(read(folder, do_lower_case), truncation)
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
        least = self.pipeline.templates[num_texts - 1].num_specials + num_texts
        if max_length < least:
            row = self.backend.encode("a", "b" if num_texts == 2 else None).tokens
            what = f"a {'pair' if num_texts == 2 else 'single text'} ({' '.join(row)})"
            raise ConfigError(f"max_seq_length is {max_length}; {what} needs {least} at least")

    def encode(self, text_a: Sequence[str], text_b: Sequence[str] | None, max_length: int) -> Tokens:
        """Token ids of each row, with special tokens: of a pair, or of a single text without text_b.

        Rows longer than `max_length` lose tokens from the end of the longer text, or as `truncation` says.
        Raises DataError on text that UTF-8 cannot carry, ConfigError where max_length leaves no token for
        each text, StoppedError between chunks.
        """
        columns = [text_a] if text_b is None else [text_a, text_b]
        self.check_length(max_length, len(columns))
        template = self.pipeline.templates[len(columns) - 1]
        room = max_length - template.num_specials

        def encode_part(part: slice) -> tuple[array[int], ...]:
            stop_flag.raise_if_set()
            ids, lengths, first_lengths, truncated = made = array("i"), array("q"), array("i"), array("b")
            for texts in zip(*self._text_ids([column[part] for column in columns], room), strict=True):
                counts = tuple(map(len, texts))
                kept = keep(counts, room, self.truncation)
                row = template.row(texts, kept)
                ids.fromlist(row)
                lengths.append(len(row))
                first_lengths.append(template.first_length(kept))
                truncated.append(kept != counts)
            return made

        parts = chunks(columns)
        whole = array("i"), array("q"), array("i"), array("b")
        # Two at a time: one is read out here, while the library works on the other on all cores.
        try:
            with ThreadPoolExecutor(2) as pool:
                for made in map(encode_part, parts) if len(parts) < 2 else pool.map(encode_part, parts):
                    for so_far, more in zip(whole, made, strict=True):
                        so_far.extend(more)
        except UnicodeEncodeError:  # `_text_ids` encodes each text
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

    def _text_ids(self, columns: Sequence[Sequence[str]], room: int) -> Sequence[Sequence[list[int]]]:
        """By column, the token ids of each text, without special tokens.

        Of a text that is far too long they are only the first, more than there is room for, where these and
        the other text settle the row: reading it all would take its time.
        """
        num_rows, texts = len(columns[0]), [text for column in columns for text in column]
        "".join(texts).encode()  # the library's own error does not say what is wrong
        size = LONG_CHARS * room + self._reach
        long = {i for i, text in enumerate(texts) if len(text) > size}
        short = ["" if i in long else text for i, text in enumerate(texts)]
        ids = [encoding.ids for encoding in self.backend.encode_batch_fast(short, add_special_tokens=False)]
        heads = self.backend.encode_batch([texts[i][:size] for i in long], add_special_tokens=False)
        for i, head in zip(long, heads, strict=True):
            ids[i] = _sure_ids(head, size - self._reach)
        unsure = []
        for i in long:
            other = (i + num_rows) % len(texts)  # the pair's other text; a single text itself
            # Which of two texts that are both too long is the longer, only their ends can tell.
            both_long = other != i and (other in long or len(ids[other]) > room)
            unsure += [i] if both_long or len(ids[i]) <= room else []
        wholes = self.backend.encode_batch_fast([texts[i] for i in unsure], add_special_tokens=False)
        for i, whole in zip(unsure, wholes, strict=True):
            ids[i] = whole.ids
        return [ids[:num_rows], ids[num_rows:]][: len(columns)]

    def files(self, max_length: int) -> dict[str, bytes]:
        """The tokenizer as files by name, which transformers' AutoTokenizer loads too."""
        config = {**self.pipeline.config, "model_max_length": max_length, "truncation": self.truncation}
        specials = {role: config[role] for role in ROLES if config.get(role) is not None}
        files = {
            "tokenizer.json": self.pipeline.document.encode(),
            "tokenizer_config.json": _to_json(config),
            "special_tokens_map.json": _to_json(specials),
        }
        if isinstance(self.backend.model, models.WordPiece):
            files["vocab.txt"] = "".join(entry + "\n" for entry in entries_of(self.backend)).encode()
        return files


def _to_json(value: object) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2, sort_keys=True) + "\n").encode()


def _sure_ids(head: Any, end: int) -> list[int]:
    """Those of whole words that end before character `end`: what follows the head cannot change them."""
    count = len(head)
    while count:
        word = head.token_to_word(count - 1)
        if head.word_to_chars(word)[1] <= end:
            break
        count = head.word_to_tokens(word)[0]
    ids: list[int] = head.ids[:count]
    return ids


def chunks(columns: Sequence[Sequence[str]]) -> list[slice]:
    """Slices of at most CHUNK_ROWS rows and, the last row aside, CHUNK_CHARS characters."""
    chars = np.sum([[len(text) for text in column] for column in columns], axis=0, dtype=np.int64).cumsum()
    parts = np.stack([np.arange(len(chars)) // CHUNK_ROWS, chars // CHUNK_CHARS])
    bounds = [*np.flatnonzero(np.diff(parts, prepend=-1).any(axis=0)).tolist(), len(chars)]
    return list(map(slice, bounds, bounds[1:]))


def offsets_of(lengths: Ints) -> Ints:
    """Where runs of these lengths begin when they stand end to end, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
