"""Scoring rows with a live model, and `PairClassifier`: a model folder → labels and probabilities.

Rows run longest first in batches cut by padded tokens, and come back in the order they were given:
what a row rides with changes its logits by rounding only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from bertpair.batching import pad_batch, token_budget_batches
from bertpair.checkpoint import final_folder
from bertpair.errors import ConfigError, DataError
from bertpair.hub import resolve_folder
from bertpair.manifest import MANIFEST_NAME, verify_folder
from bertpair.model import BertClassifier, Layer
from bertpair.model_config import read_folder
from bertpair.packed import PackedClassifier
from bertpair.pretrained import load_model
from bertpair.quantize import check_int8, choose_linear, int8_linear
from bertpair.runtime import Precision, resolve_device, resolve_precision, set_threads, stop_flag
from bertpair.tokenizer import Tokenizer, Tokens

Pair = tuple[str, str] | Sequence[str] | str


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

    model: BertClassifier | PackedClassifier
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
        lengths = np.diff(tokens.offsets)
        batches = token_budget_batches(lengths, self.max_batch_tokens, self.pad_to_multiple_of)
        out = torch.empty(len(tokens), self.model.config.num_labels, dtype=torch.float32, device=self.device)
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode(), self.precision.autocast(self.device):
                for rows in batches:
                    stop_flag.raise_if_set()
                    out[torch.from_numpy(rows).to(self.device)] = self._run(tokens, rows)
                    if on_rows is not None:
                        on_rows(len(rows))
        finally:
            self.model.train(was_training)
        return out.cpu().numpy()

    def _run(self, tokens: Tokens, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        batch = pad_batch(
            tokens,
            rows,
            pad_id=self.pad_id,
            # Padding is free of work in a packed model, and rows of one length need no mask.
            pad_to_multiple_of=1 if isinstance(self.model, PackedClassifier) else self.pad_to_multiple_of,
            max_length=self.max_length,
        ).to(self.device)
        logits: torch.Tensor = self.model(batch.input_ids, batch.token_type_ids, batch.attention_mask)
        return logits.float()


def softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Row-wise softmax of (rows, C) in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    exponentials = np.exp(shifted)
    return np.asarray(exponentials / exponentials.sum(axis=-1, keepdims=True))


def split_pairs(pairs: Sequence[Pair]) -> tuple[list[str], list[str] | None]:
    """Pairs, or single texts, as two columns; the second is None for single texts.

    Raises DataError naming the row where the two are mixed or something is not a text.
    """
    if isinstance(pairs, str):
        raise DataError(f"pairs: found one text {pairs[:40]!r}; expected a list of pairs, or of single texts")
    single = bool(pairs) and isinstance(pairs[0], str)
    for row, pair in enumerate(pairs):
        texts = [pair] if single else pair
        count = 1 if single else 2
        if isinstance(texts, str) or len(texts) != count or not all(isinstance(text, str) for text in texts):
            expected = "a text like the first row" if single else "two texts"
            raise DataError(f"pairs[{row}]: expected {expected}, found {pair!r:.80}")
    if single:
        return [str(text) for text in pairs], None
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


class PairClassifier:
    """A trained model folder, ready to answer: `PairClassifier.from_pretrained(folder).predict(pairs)`.

    Thread-compatible, not thread-safe: one caller at a time.
    """

    def __init__(self, scorer: Scorer, tokenizer: Tokenizer, labels: tuple[str, ...] | None) -> None:
        self.scorer = scorer
        self.tokenizer = tokenizer
        self.labels = labels  # in id order; None for a regression model
        self.max_seq_length = scorer.max_length

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        max_seq_length: int | None = None,
        device: str = "auto",
        amp: str = "off",
        num_threads: int | None = None,
        max_batch_tokens: int = 4096,
        optimize: bool = True,
        quantize: str | None = None,
    ) -> PairClassifier:
        """Open a folder that training wrote, a checkpoint in it, or any fine-tuned Hugging Face BERT.

        Texts are cut at `max_seq_length`: by default where training cut them, never beyond the model's
        positions. `num_threads` sets PyTorch's threads for the whole process; None leaves them alone. A
        folder with a manifest of ours is verified first. `max_batch_tokens` bounds a batch, padding included.
        On a CPU the network is prepared for answering (`packed.py`) unless `optimize` is false: then it
        computes as training's evaluation did, bit for bit. `quantize="int8"` (CPU, amp off) trades a little
        accuracy for speed.
        Raises CheckpointError where the folder cannot be used, ConfigError for a bad argument.
        """
        if num_threads is not None:
            set_threads(num_threads)
        path = final_folder(resolve_folder(name_or_path, revision=revision, cache_dir=cache_dir))
        if (path / MANIFEST_NAME).is_file():
            verify_folder(path, allow_extra=True)
        folder = read_folder(path)
        tokenizer = Tokenizer.from_folder(path, word_table=folder.config.vocab_size)
        model, _ = load_model(folder, num_labels=folder.config.num_labels, require_head=True)
        target = resolve_device(device)
        cut = trained_cut(tokenizer, folder.config.max_position_embeddings, max_seq_length)
        precision = resolve_precision(
            amp,
            target,
            hidden_size=folder.config.hidden_size,
            intermediate_size=folder.config.intermediate_size,
            tokens=8 * cut,
        )
        labels = None
        if not folder.regression:
            labels = folder.labels or tuple(f"LABEL_{i}" for i in range(folder.config.num_labels))
        check_quantize(quantize, target, precision)
        ready: BertClassifier | PackedClassifier = model.to(target).eval()
        if target.type == "cpu" and (optimize or quantize):
            ready = prepare(model, precision, quantize)
        scorer = Scorer(ready, tokenizer.pad_id, target, precision, cut, max_batch_tokens)
        return cls(scorer, tokenizer, labels)

    def predict(self, pairs: Sequence[Pair]) -> list[Prediction]:
        """One `Prediction` a row, in the order given. `pairs` holds (text_a, text_b), or single texts."""
        return self.predict_tokens(self._encode(pairs))

    def predict_tokens(self, tokens: Tokens) -> list[Prediction]:
        """One `Prediction` a row of token ids, as `tokenizer.encode` gives them."""
        return make_predictions(self.scorer.logits(tokens), tokens, self.labels)

    def logits(self, pairs: Sequence[Pair]) -> npt.NDArray[np.float32]:
        """Raw logits, (rows, C) float32, in the order given."""
        return self.scorer.logits(self._encode(pairs))

    def _encode(self, pairs: Sequence[Pair]) -> Tokens:
        text_a, text_b = split_pairs(pairs)
        return self.tokenizer.encode(text_a, text_b, self.max_seq_length)


def make_predictions(
    logits: npt.NDArray[np.float32], tokens: Tokens, labels: Sequence[str] | None
) -> list[Prediction]:
    """Logits (rows, C) as predictions; regression where `labels` is None."""
    lengths = np.diff(tokens.offsets).tolist()
    truncated = tokens.truncated.tolist()
    if labels is None:
        values = logits[:, 0].tolist()
        return [
            Prediction(None, value, {}, cut, length)
            for value, cut, length in zip(values, truncated, lengths, strict=True)
        ]
    table = softmax(logits) if len(logits) else np.zeros((0, len(labels)))
    best = table.argmax(axis=1).tolist() if len(table) else []
    return [
        Prediction(labels[i], row[i], dict(zip(labels, row, strict=True)), cut, length)
        for i, row, cut, length in zip(best, table.tolist(), truncated, lengths, strict=True)
    ]


def check_quantize(quantize: str | None, device: torch.device, precision: Precision) -> None:
    """ConfigError where `quantize` is unknown, or cannot stand with the device or the precision."""
    if quantize is None:
        return
    if quantize != "int8":
        raise ConfigError(f"quantize: found {quantize!r}; allowed: int8, or null")
    if device.type != "cpu":
        raise ConfigError(f"quantize int8 runs on the CPU only, found device {device}")
    if precision.name != "off":
        raise ConfigError(f"quantize int8 goes with float32, found amp {precision.name}")
    check_int8()


@torch.no_grad()
def prepare(model: BertClassifier, precision: Precision, quantize: str | None) -> PackedClassifier:
    """The model prepared for answering on this CPU; its own weights are free to go."""
    if quantize is not None:
        return PackedClassifier(model, int8_linear).eval()
    dtype = torch.bfloat16 if precision.name == "bf16" else torch.float32
    first = model.layers[0]
    assert isinstance(first, Layer)
    return PackedClassifier(model, choose_linear(first.up.weight.detach().to(dtype)), dtype).eval()


def trained_cut(
    tokenizer: Tokenizer, positions: int, asked: int | None, trained_at: int | None = None
) -> int:
    """Where texts are cut: as asked, else where training cut them, never beyond the model's positions."""
    if asked is not None and not 1 <= asked <= positions:
        raise ConfigError(f"max_seq_length: found {asked}; this model has {positions} positions")
    return min(asked or tokenizer.model_max_length or positions, positions)
