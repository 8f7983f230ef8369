"""Scoring rows with a live model, and `PairClassifier`: a model folder → labels and probabilities.

Rows run longest first in batches cut by padded tokens, and come back in the order they were given:
what a row rides with changes its logits by rounding only.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from bertpair.checkpoints.checkpoint import open_model
from bertpair.console import stop_flag
from bertpair.data.batching import pad_batch, token_budget_batches
from bertpair.data.tokenizer import Tokenizer, Tokens
from bertpair.errors import ConfigError, DataError
from bertpair.model.bert import BertClassifier
from bertpair.model.config import ModelFolder, check_pairs, name_labels
from bertpair.model.families import Network
from bertpair.model.family import BERT
from bertpair.model.packed import PackedClassifier, check_int8, choose_linear, int8_linear
from bertpair.model.pretrained import load_model
from bertpair.runtime import (
    Precision,
    explain_memory,
    resolve_device,
    resolve_precision,
    set_threads,
    survive_fork,
)
from bertpair.settings.stored import stored_settings
from bertpair.settings.tasks import find_task

logger = logging.getLogger(__name__)

NAMES = (("text_a", "text_b"), ("sentence1", "sentence2"))  # of the service's routes, the new and the old
_SINGLE = "this model takes pairs of texts, found single texts"
_EXPECTED_NAMES = "text_a and text_b, or sentence1 and sentence2 (the first alone for a single text)"

Pairs = Iterable[Any]  # (text_a, text_b) each, or single texts, or mappings with `NAMES`; or a table


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The answer for one row. For a regression model `label` is None, `score` the value, no probabilities."""

    label: str | None
    score: float  # the probability of `label`, or the value
    probabilities: dict[str, float]  # by label, in the order of the label ids
    truncated: bool  # the texts were longer than the cut
    num_tokens: int  # after the cut, special tokens included


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A live model with what running it takes; scores rows of token ids."""

    model: Network | PackedClassifier
    pad_id: int
    device: torch.device
    precision: Precision
    max_length: int
    max_batch_tokens: int = 4096  # padded tokens of one batch
    pad_to_multiple_of: int = 8

    def logits(self, tokens: Tokens, on_rows: Callable[[int], None] | None = None) -> npt.NDArray[np.float32]:
        """Logits in the order of `tokens`, (rows, C). Runs in eval mode; the model's mode is put back.

        `on_rows(n)` is called after each batch of n rows. Raises StoppedError when the stop flag is set.
        """
        survive_fork()
        batches = token_budget_batches(tokens.lengths, self.max_batch_tokens, self.pad_to_multiple_of)
        # Padding is free of work in a packed model, and rows of one length need no mask.
        multiple = 1 if isinstance(self.model, PackedClassifier) else self.pad_to_multiple_of
        found = []
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode(), self.precision.autocast(self.device):
                for rows in batches:
                    stop_flag.raise_if_set()
                    batch = pad_batch(
                        tokens,
                        rows,
                        pad_id=self.pad_id,
                        pad_to_multiple_of=multiple,
                        max_length=self.max_length,
                    ).to(self.device)
                    logits = self.model(batch.input_ids, batch.token_type_ids, batch.attention_mask)
                    found.append(logits.float())
                    if on_rows is not None:
                        on_rows(len(rows))
        finally:
            self.model.train(was_training)
        out = np.empty((len(tokens), self.model.config.num_labels), np.float32)
        if batches:  # one copy: each would wait for the device
            out[np.concatenate(batches)] = torch.cat(found).cpu().numpy()
        return out


def softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Row-wise softmax of (rows, C) in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    exponentials = np.exp(shifted)
    return np.asarray(exponentials / exponentials.sum(axis=-1, keepdims=True))


def as_rows(pairs: Pairs, takes_pairs: bool | None) -> list[Any]:
    """What a caller gave as a list of rows: each a text, two texts, or a mapping with the service's names.

    One pair alone is one row: two texts given to a model of pairs, or, where `takes_pairs` is not known, a
    tuple of two texts. Raises DataError for what holds no rows.
    """
    if hasattr(pairs, "columns"):  # a data frame
        return _rows_of_table(pairs, list(pairs.columns), takes_pairs)
    is_one_value = isinstance(pairs, np.ndarray) and not pairs.ndim
    if isinstance(pairs, str | bytes) or is_one_value or not isinstance(pairs, Iterable):
        raise DataError(f"pairs: found {pairs!r:.60}; expected a list of pairs, or of single texts")
    if isinstance(pairs, Mapping):
        is_row = any(isinstance(pairs.get(name), str) for names in NAMES for name in names)
        has_columns = any(isinstance(value, Iterable) for value in pairs.values())
        return [pairs] if is_row or not has_columns else _rows_of_table(pairs, list(pairs), takes_pairs)
    rows = list(pairs)
    is_bare = takes_pairs or (takes_pairs is None and isinstance(pairs, tuple))
    return [rows] if is_bare and len(rows) == 2 and all(isinstance(row, str) for row in rows) else rows


def _rows_of_table(table: Any, columns: Sequence[Any], takes_pairs: bool | None) -> list[Any]:
    """The columns by the service's names; other names only where the table has nothing but the texts."""
    names = next((names for names in NAMES if names[0] in columns), None)
    found = [name for name in names or columns if name in columns and table[name] is not None]
    said = ", ".join(map(str, columns))
    if (names is None and len(columns) > 2) or not found:
        raise DataError(f"pairs: found a table with the columns {said}; expected {_EXPECTED_NAMES}")
    if names is not None and takes_pairs and len(found) < 2:
        raise DataError(f"pairs: {_SINGLE}; {names[1]} is missing (found the columns {said})")
    for name in found:
        if columns.count(name) > 1 or isinstance(table[name], str) or not isinstance(table[name], Iterable):
            raise DataError(f"pairs: expected one column {name} with a text for each row")
    texts = [list(table[name]) for name in found]
    if len({*map(len, texts)}) > 1:
        counts = ", ".join(f"{name} has {len(column)}" for name, column in zip(found, texts, strict=True))
        raise DataError(f"pairs: expected columns with equally many rows; {counts}")
    return texts[0] if len(texts) == 1 else list(zip(*texts, strict=True))


def split_pairs(rows: Sequence[Any], takes_pairs: bool | None = None) -> tuple[list[str], list[str] | None]:
    """Rows as two columns; the second is None for single texts.

    Raises DataError naming the row where the two are mixed, something is not a text, or, for a model that
    takes pairs, a mapping holds one text.
    """
    found = [_texts_of(number, row, takes_pairs) for number, row in enumerate(rows)]
    count = len(found[0]) if found else 2
    for number, texts in enumerate(found):
        if len(texts) != count:
            expected = "a single text" if count == 1 else "two texts"
            raise DataError(
                f"pairs[{number}]: expected {expected} like the first row, found {rows[number]!r:.80}"
            )
    return [texts[0] for texts in found], None if count == 1 else [texts[1] for texts in found]


def _texts_of(number: int, row: Any, takes_pairs: bool | None) -> list[str]:
    """The one or two texts of a row."""
    if isinstance(row, str):
        return [row]
    if isinstance(row, Mapping):
        names = next((names for names in NAMES if names[0] in row), None)
        keys = ", ".join(map(str, row)) or "none"
        if names is None:
            raise DataError(f"pairs[{number}]: found the keys {keys}; expected {_EXPECTED_NAMES}")
        texts = [row[name] for name in names if row.get(name) is not None]
        if takes_pairs and len(texts) < 2:
            raise DataError(f"pairs[{number}]: {_SINGLE}; {names[1]} is missing (found the keys {keys})")
    else:
        texts = list(row) if isinstance(row, list | tuple | np.ndarray) else []
    if not 1 <= len(texts) <= 2 or (len(texts) == 1 and not isinstance(row, Mapping)):
        raise DataError(f"pairs[{number}]: expected two texts, found {row!r:.80}")
    for text in texts:
        if not isinstance(text, str):
            raise DataError(f"pairs[{number}]: expected texts, found {text!r:.80} ({type(text).__name__})")
    return texts


class PairClassifier:
    """A trained model folder, ready to answer: `PairClassifier.from_pretrained(folder).predict(pairs)`.

    Thread-compatible, not thread-safe: one caller at a time. Copies and pickles answer alike. A process that
    is forked after the first use computes with one thread; started by spawn or forkserver, with all.
    """

    def __init__(
        self,
        scorer: Scorer,
        tokenizer: Tokenizer,
        labels: tuple[str, ...] | None,
        takes_pairs: bool | None = None,
        header: tuple[str, ...] | None = None,
    ) -> None:
        self.scorer = scorer
        self.tokenizer = tokenizer
        self.labels = labels  # in id order; None for a regression model
        self.takes_pairs = takes_pairs  # None: not known; the first use settles it
        self.header = header  # of the training file; None: it had none, or it is not known
        self.max_seq_length = scorer.max_length

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        labels: Sequence[str] | None = None,
        max_seq_length: int | None = None,
        truncation: str | None = None,
        device: str = "auto",
        amp: str = "off",
        num_threads: int | None = None,
        max_batch_tokens: int = 4096,
        optimize: bool = True,
        quantize: str | None = None,
    ) -> PairClassifier:
        """Open a folder that training wrote, a checkpoint in it, or a fine-tuned model of Hugging Face's.

        `labels` names the labels of a folder without names, in id order.
        Texts are cut at `max_seq_length`, as `truncation` says: by default where and as training cut them,
        never beyond the model's positions. `num_threads` sets PyTorch's threads for the whole process; None
        leaves them alone. A folder with a manifest of ours is verified first. `max_batch_tokens` bounds a
        batch, padding included. On a CPU a BERT is prepared for answering (`packed.py`) unless `optimize` is
        false: then it computes as training's evaluation did, bit for bit. `quantize="int8"` (BERT, CPU, amp
        off) trades a little accuracy for speed.
        Raises CheckpointError where the folder cannot be used, ConfigError for a bad argument.
        """
        survive_fork()
        if num_threads is not None:
            set_threads(num_threads)
        folder = open_model(name_or_path, revision=revision, cache_dir=cache_dir)
        words = folder.config.vocab_size
        tokenizer = Tokenizer.from_folder(folder.path, word_table=words, truncation=truncation)
        takes_pairs = stored_takes_pairs(folder)
        if takes_pairs:
            check_pairs(folder)
        elif not folder.can_take_pairs:
            takes_pairs = False
        target = resolve_device(device)
        positions = folder.max_length
        if max_seq_length is not None and not 1 <= max_seq_length <= positions:
            raise ConfigError(f"max_seq_length: found {max_seq_length}; this model has {positions} positions")
        cut = min(max_seq_length or tokenizer.model_max_length or positions, positions)
        precision = resolve_precision(amp, target, hidden_size=folder.config.hidden_size)
        names = name_labels(folder, labels)
        packs = folder.family is BERT and folder.config.pooling == "cls"
        check_quantize(quantize, target, precision, packs)
        with explain_memory(target), torch.no_grad():
            model, _ = load_model(folder, num_labels=folder.config.num_labels, require_head=True)
            ready: Network | PackedClassifier = model.to(target).eval()
            if (
                isinstance(model, BertClassifier)
                and packs
                and target.type == "cpu"
                and (optimize or quantize)
            ):
                make = int8_linear if quantize else choose_linear(precision.dtype)
                ready = PackedClassifier(model, make, precision.dtype).eval()
            else:  # convert once what autocast would for every batch; products stay the same to the bit
                for module in model.modules():
                    if isinstance(module, nn.Linear):
                        module.to(precision.dtype)
        scorer = Scorer(ready, tokenizer.pad_id, target, precision, cut, max_batch_tokens)
        return cls(scorer, tokenizer, names, takes_pairs, folder.header)

    def predict(self, pairs: Pairs) -> list[Prediction]:
        """One `Prediction` a row, in the order given.

        `pairs` holds what the model was trained on: (text_a, text_b) each, or single texts. Rows may be
        mappings with text_a and text_b; arrays, generators, data frames and mappings of columns do too. Two
        texts alone, given to a model of pairs, are one pair. Raises DataError for anything else.
        """
        return self.predict_tokens(self._encode(pairs))

    def predict_tokens(self, tokens: Tokens) -> list[Prediction]:
        """One `Prediction` a row of token ids, as `tokenizer.encode` gives them."""
        return make_predictions(self.scorer.logits(tokens), tokens, self.labels)

    def logits(self, pairs: Pairs) -> npt.NDArray[np.float32]:
        """Raw logits, (rows, C) float32, in the order given."""
        return self.scorer.logits(self._encode(pairs))

    def _encode(self, pairs: Pairs) -> Tokens:
        text_a, text_b = split_pairs(as_rows(pairs, self.takes_pairs), self.takes_pairs)
        came, kinds = text_b is not None, {True: "pairs of texts", False: "single texts"}
        if text_a and self.takes_pairs is None:
            logger.info("nothing in the model folder says so: from here on it takes %s", kinds[came])
            self.takes_pairs = came
        if text_a and self.takes_pairs is not came:
            raise DataError(f"pairs: this model takes {kinds[bool(self.takes_pairs)]}, found {kinds[came]}")
        return self.tokenizer.encode(text_a, text_b, self.max_seq_length)


def stored_takes_pairs(folder: ModelFolder) -> bool | None:
    """Whether the model takes pairs: as config.json says, else as the settings of its training say."""
    if folder.takes_pairs is not None:
        return folder.takes_pairs
    settings = stored_settings(folder.path)
    column = settings.get("text_b_column", "auto")
    text_b = find_task(settings.get("task_name")).text_b if column == "auto" else column
    return text_b is not None if settings else None


def make_predictions(
    logits: npt.NDArray[np.float32], tokens: Tokens, labels: Sequence[str] | None
) -> list[Prediction]:
    """Logits (rows, C) as predictions; regression where `labels` is None."""
    rest = list(zip(tokens.truncated.tolist(), tokens.lengths.tolist(), strict=True))
    if labels is None:
        values = logits[:, 0].tolist()
        return [Prediction(None, value, {}, *each) for value, each in zip(values, rest, strict=True)]
    table = softmax(logits) if len(logits) else np.zeros((0, len(labels)))
    best = table.argmax(axis=1).tolist() if len(table) else []
    return [
        Prediction(labels[i], row[i], dict(zip(labels, row, strict=True)), *each)
        for i, row, each in zip(best, table.tolist(), rest, strict=True)
    ]


def check_quantize(quantize: str | None, device: torch.device, precision: Precision, packs: bool) -> None:
    """ConfigError where `quantize` is unknown, or cannot stand with the device, precision or network."""
    if quantize is None:
        return
    if quantize != "int8":
        raise ConfigError(f"quantize: found {quantize!r}; allowed: int8, or null")
    if device.type != "cpu":
        raise ConfigError(f"quantize int8 runs on the CPU only, found device {device}")
    if precision.name != "off":
        raise ConfigError(f"quantize int8 goes with float32, found amp {precision.name}")
    if not packs:
        raise ConfigError("quantize int8 is for BERT with pooling cls only: leave it out for other networks")
    check_int8()
