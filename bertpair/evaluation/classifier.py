"""`PairClassifier`: a model folder → labels and probabilities."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from bertpair.checkpoints.checkpoint import open_model
from bertpair.data.tokenizer import Tokenizer, Tokens
from bertpair.errors import ConfigError, raise_faults
from bertpair.evaluation.agreement import Agreement
from bertpair.evaluation.calibration import AS_TRAINED, Decision, read_decision
from bertpair.evaluation.conversion import Conversion, Samples
from bertpair.evaluation.openvino import OpenVINOScorer
from bertpair.evaluation.rows import WINDOW_ROWS, Pairs, as_rows, row_windows, split_pairs
from bertpair.evaluation.scorer import BATCH_TOKENS, Scorer, softmax
from bertpair.model.bert import BertClassifier
from bertpair.model.config import ModelFolder, check_pairs, name_labels
from bertpair.model.families import Network
from bertpair.model.family import BERT
from bertpair.model.packed import PackedClassifier
from bertpair.model.pretrained import load_model
from bertpair.runtime import explain_memory, resolve_device, resolve_precision, set_threads, survive_fork
from bertpair.settings.engine import EngineSettings, engine_faults
from bertpair.settings.stored import stored_settings
from bertpair.settings.tasks import find_task

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The answer for one row. For a regression model `label` is None, `score` the value, no probabilities."""

    label: str | None
    score: float  # the probability of `label`, or the value
    probabilities: dict[str, float]  # by label, in the order of the label ids
    truncated: bool  # the texts were longer than the cut
    num_tokens: int  # after the cut, special tokens included


class PairClassifier:
    """A trained model folder, ready to answer: `PairClassifier.from_pretrained(folder).predict(pairs)`.

    Thread-compatible, not thread-safe: one caller at a time. Copies and pickles answer alike. A process that
    is forked after the first use computes with one thread; started by spawn or forkserver, with all.
    """

    def __init__(
        self,
        scorer: Scorer | OpenVINOScorer,
        tokenizer: Tokenizer,
        labels: tuple[str, ...] | None,
        takes_pairs: bool | None = None,
        header: tuple[str, ...] | None = None,
        agreement: Agreement | None = None,
        decision: Decision = AS_TRAINED,
    ) -> None:
        self.scorer = scorer
        self.tokenizer = tokenizer
        self.labels = labels  # in id order; None for a regression model
        self.takes_pairs = takes_pairs  # None: not known; the first use settles it
        self.header = header  # of the training file; None: it had none, or it is not known
        self.agreement = agreement  # of int8 with float32, where that was measured
        self.decision = decision  # the temperature and threshold, where they were asked for
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
        max_batch_tokens: int = BATCH_TOKENS,
        optimize: bool = True,
        engine: str | None = None,
        quantize: str | None = None,
        calibration_pairs: Pairs | str | Path | None = None,
        quantize_check: Pairs | str | Path | None = None,
        temperature: float | str | None = None,
        threshold: float | str | None = None,
        positive_label: str | None = None,
    ) -> PairClassifier:
        """Open a folder that training wrote, a checkpoint in it, or a fine-tuned model of Hugging Face's.

        `labels` names the labels of a folder without names, in id order.
        Texts are cut at `max_seq_length`, as `truncation` says: by default where and as training cut them,
        never beyond the model's positions. `num_threads` sets PyTorch's threads for the whole process; None
        leaves them alone. A folder with a manifest of ours is verified first. `max_batch_tokens` bounds a
        batch, padding included. On a CPU a BERT is prepared for answering (`packed.py`) unless `optimize` is
        false: then it computes as training's evaluation did, bit for bit.

        `engine="openvino"` computes on the CPU with OpenVINO, and `quantize="int8"` with 8-bit integers too,
        which trades a little accuracy for speed; the converted network is kept in the folder's derived/.
        int8 is calibrated with 200 of `calibration_pairs`, pairs or a file of them, by default the training
        file. How it agrees with float32 on `quantize_check`, by default on further ones of those, stands in
        `agreement`.

        `temperature` divides the logits before they become probabilities. With two labels, `threshold` is the
        probability of `positive_label` (by default that of the training) from which it is the answer.
        `"stored"` takes what evaluate.py found for these weights.
        Raises CheckpointError where the folder cannot be used, ConfigError for a bad argument, DataError for
        pairs that cannot be used.
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
        settings = EngineSettings(
            engine=engine, quantize=quantize, temperature=temperature, threshold=threshold
        )
        raise_faults([*engine_faults(settings, device)])
        if (calibration_pairs is not None or quantize_check is not None) and quantize is None:
            raise ConfigError("calibration_pairs and quantize_check have no effect without quantize int8")
        target = resolve_device("cpu" if settings.runs_openvino else device)
        positions = folder.max_length
        if max_seq_length is not None and not 1 <= max_seq_length <= positions:
            raise ConfigError(f"max_seq_length: found {max_seq_length}; this model has {positions} positions")
        cut = min(max_seq_length or tokenizer.model_max_length or positions, positions)
        precision = resolve_precision(amp, target, hidden_size=folder.config.hidden_size)
        names = name_labels(folder, labels)
        positive = positive_label or stored_settings(folder.path).get("positive_label")
        decision = read_decision(folder.path, names, settings, positive)
        if settings.runs_openvino:
            samples = Samples.read(calibration_pairs, quantize_check, takes_pairs)
            conversion = Conversion(folder, tokenizer, precision, cut, quantize, samples)
            with explain_memory(target):
                converted, agreement = conversion.open(max_batch_tokens)
            return cls(converted, tokenizer, names, takes_pairs, folder.header, agreement, decision)
        with explain_memory(target), torch.no_grad():
            model, _ = load_model(folder, num_labels=folder.config.num_labels, require_head=True)
            ready: Network | PackedClassifier = model.to(target).eval()
            packs = folder.family is BERT and folder.config.pooling == "cls"
            if isinstance(model, BertClassifier) and packs and target.type == "cpu" and optimize:
                ready = PackedClassifier(model, precision.dtype).eval()
            else:  # convert once what autocast would for every batch; products stay the same to the bit
                for module in model.modules():
                    if isinstance(module, nn.Linear):
                        module.to(precision.dtype)
        scorer = Scorer(ready, tokenizer.pad_id, target, precision, cut, max_batch_tokens)
        return cls(scorer, tokenizer, names, takes_pairs, folder.header, decision=decision)

    def predict(self, pairs: Pairs) -> list[Prediction]:
        """One `Prediction` a row, in the order given.

        `pairs` holds what the model was trained on: (text_a, text_b) each, or single texts. Rows may be
        mappings with text_a and text_b; arrays, generators, data frames and mappings of columns do too. Two
        texts alone, given to a model of pairs, are one pair. Raises DataError for anything else.
        """
        return self._predict_rows(as_rows(pairs, self.takes_pairs))

    def predict_iter(self, pairs: Pairs, *, window_rows: int = WINDOW_ROWS) -> Iterator[Prediction]:
        """One `Prediction` a row, in the order given, for rows that need not fit into memory.

        Reads `window_rows` rows of `pairs`, an iterable, answers them as `predict` does, and only then
        reads more. Each item is one row: two texts in an iterator are no pair. What is no stream (one pair
        alone, a mapping of columns, a data frame) is taken whole, as by `predict`.
        Raises ConfigError for a bad `window_rows`. The iterator raises DataError, with the number of the row
        in all of `pairs`, when it comes to its window, and is then at its end.
        """
        if window_rows < 1:
            raise ConfigError(f"window_rows: found {window_rows}; expected at least 1")
        windows = row_windows(pairs, self.takes_pairs, window_rows)
        answers = map(self._predict_rows, windows, itertools.count(step=window_rows))
        # No variable keeps a window while the next one is made; only a generator ends with its first fault.
        return (answer for answer in itertools.chain.from_iterable(answers))

    def predict_tokens(self, tokens: Tokens) -> list[Prediction]:
        """One `Prediction` a row of token ids, as `tokenizer.encode` gives them."""
        return make_predictions(self.scorer.logits(tokens), tokens, self.labels, self.decision)

    def logits(self, pairs: Pairs) -> npt.NDArray[np.float32]:
        """Raw logits, (rows, C) float32, in the order given."""
        return self.scorer.logits(self._encode(as_rows(pairs, self.takes_pairs)))

    def _predict_rows(self, rows: Sequence[Any], first: int = 0) -> list[Prediction]:
        """`first` is the number of the first row, for faults."""
        return self.predict_tokens(self._encode(rows, first))

    def _encode(self, rows: Sequence[Any], first: int = 0) -> Tokens:
        text_a, text_b = split_pairs(rows, self.takes_pairs, first)
        if text_a and self.takes_pairs is None:
            self.takes_pairs = text_b is not None
            kind = "pairs of texts" if self.takes_pairs else "single texts"
            logger.info("nothing in the model folder says so: from here on it takes %s", kind)
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
    logits: npt.NDArray[np.float32],
    tokens: Tokens,
    labels: Sequence[str] | None,
    decision: Decision = AS_TRAINED,
) -> list[Prediction]:
    """Logits (rows, C) as predictions; regression where `labels` is None."""
    rest = list(zip(tokens.truncated.tolist(), tokens.lengths.tolist(), strict=True))
    if labels is None:
        values = logits[:, 0].tolist()
        return [Prediction(None, value, {}, *each) for value, each in zip(values, rest, strict=True)]
    if not len(logits):
        return []
    scaled = decision.scale(logits)
    return [
        Prediction(labels[i], row[i], dict(zip(labels, row, strict=True)), *each)
        for i, row, each in zip(decision.choose(scaled), softmax(scaled).tolist(), rest, strict=True)
    ]
