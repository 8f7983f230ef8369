"""Data files read, checked and turned into token ids and targets."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bertpair.data.source import targets
from bertpair.data.token_cache import encode_cached
from bertpair.data.tokenizer import Tokenizer, Tokens
from bertpair.data.tsv import Pairs

logger = logging.getLogger(__name__)

MANY_UNKNOWN = 0.1  # of the tokens; real text in a vocabulary's own languages stays under 0.01

Targets = npt.NDArray[np.int64] | npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Split:
    """One data set, ready for the model: row i of `pairs`, `tokens` and `targets` are the same row."""

    pairs: Pairs
    tokens: Tokens
    targets: Targets | None  # int64 label ids or float32 values; None for a file without labels

    def __len__(self) -> int:
        return len(self.tokens)


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How texts become token ids: the tokenizer, the cut, and where finished work is kept."""

    tokenizer: Tokenizer
    max_length: int
    cache_dir: Path | None
    overwrite_cache: bool = False

    def split(self, pairs: Pairs, labels: Sequence[str] | None, *, name: str) -> Split:
        """Encode `pairs`; `labels` in id order, None for regression. Says how many rows were cut."""
        tokens = encode_cached(
            self.tokenizer,
            pairs.text_a,
            pairs.text_b,
            self.max_length,
            cache_dir=self.cache_dir,
            overwrite=self.overwrite_cache,
        )
        self._report(name, tokens)
        return Split(pairs, tokens, None if pairs.labels is None else targets(pairs, labels))

    def _report(self, name: str, tokens: Tokens) -> None:
        lengths = np.diff(tokens.offsets)
        if not len(lengths):
            return
        cut = int(tokens.truncated.sum())
        share = 100 * cut / len(lengths)
        logger.info(
            "%s: %d rows, %.1f tokens a row (longest %d); %d rows (%.1f %%) cut at %d",
            name,
            len(lengths),
            lengths.mean(),
            lengths.max(),
            cut,
            share,
            self.max_length,
        )
        words = np.isin(tokens.ids, (self.tokenizer.cls_id, self.tokenizer.sep_id), invert=True).sum()
        unknown = int((tokens.ids == self.tokenizer.unk_id).sum())
        if unknown > MANY_UNKNOWN * words:
            logger.warning(
                "%s: %.0f %% of the tokens are [UNK], which tells the model nothing of the text: "
                "the vocabulary is not one for these texts",
                name,
                100 * unknown / words,
            )
