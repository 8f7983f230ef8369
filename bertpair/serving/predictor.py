"""The model as a server wants it: rows of token ids in, predictions out, and what a client may know of it.

`encode` and `check_agreement` may run on any thread, `run` and `time_batch` belong to the model's own.
"""

import dataclasses
import logging
import math
import timeit
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bertpair.checkpoints.checkpoint import open_model, weights_digest
from bertpair.data.source import resolve_source
from bertpair.data.tokenizer import Tokens, offsets_of
from bertpair.errors import ConfigError, DataError, first_line
from bertpair.evaluation.classifier import PairClassifier, Prediction
from bertpair.model.packed import fill_up
from bertpair.runtime import set_threads
from bertpair.serving.batcher import ROUND_UP
from bertpair.serving.requests import RequestError
from bertpair.settings.config import DataSettings
from bertpair.settings.serve import RequestLimits, ServeConfig, settle_limits
from bertpair.settings.stored import model_settings

logger = logging.getLogger(__name__)

CHECK_ROWS = 256


@dataclasses.dataclass(frozen=True)
class TokenRow:
    """One row's token ids, special tokens included."""

    ids: npt.NDArray[np.int32]
    first_length: int
    truncated: bool

    def __len__(self) -> int:
        return len(self.ids)


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How predictions compare with float32's on `num_rows` rows of a file."""

    num_rows: int
    agreement: float  # part of the rows with the same label; for a regression, 1 within rounding of 0.01
    largest_change: float  # of a probability, or of the value

    @property
    def is_enough(self) -> bool:
        return self.agreement >= 0.98


@dataclasses.dataclass
class Predictor:
    """A loaded model."""

    classifier: PairClassifier
    name: str
    version: str  # the first 12 hex digits of the weights' sha256
    takes_pairs: bool
    limits: RequestLimits
    precision: str  # float32, bf16, fp16 or int8
    settings: Mapping[str, Any]  # those it was trained with
    num_threads: int
    agreement: Agreement | None = None  # as `check_agreement` finds it

    @property
    def labels(self) -> tuple[str, ...] | None:
        return self.classifier.labels

    @property
    def cut(self) -> int:
        return self.classifier.max_seq_length

    def encode(self, text_a: Sequence[str], text_b: Sequence[str] | None = None) -> list[TokenRow]:
        """The rows' token ids, cut where the model's texts are cut."""
        tokens = self.classifier.tokenizer.encode(text_a, text_b, self.cut)
        ids = np.split(tokens.ids, tokens.offsets[1:-1])
        return [*map(TokenRow, ids, tokens.first_lengths.tolist(), tokens.truncated.tolist())]

    def run(self, rows: list[TokenRow]) -> list[Prediction | Exception]:
        """A prediction per row, in order; an error in the place of one that is not finite."""
        error = RequestError(500, "not_a_number", "the model's answer is not a finite number")
        predictions = self.classifier.predict_tokens(join_rows(rows))
        return [each if math.isfinite(each.score) else error for each in predictions]

    def time_batch(self, lengths: Sequence[int]) -> float:
        """Seconds of one batch of rows of these lengths, the better of two runs: the first may prepare."""
        pad_id = self.classifier.tokenizer.pad_id
        tokens = join_rows([TokenRow(np.full(n, pad_id, np.int32), n, False) for n in lengths])
        return min(timeit.repeat(lambda: self.classifier.predict_tokens(tokens), number=1, repeat=2))

    def warm_shapes(self, max_tokens: int, max_rows: int) -> Iterator[list[int]]:
        """Lengths of batches that bring every number of tokens and of rows that a kernel is kept for."""
        for count in sorted({fill_up(count) for count in range(1, max_tokens + 1)}):
            whole, rest = divmod(count, self.cut)
            yield [self.cut] * whole + [rest] * (rest > 0)
        most = min(max_rows, max_tokens // ROUND_UP)  # of the shortest that the queue counts
        for count in sorted({fill_up(count) for count in range(1, most + 1)}):
            yield [ROUND_UP] * min(count, max_rows)

    def check_agreement(self, path: str, folder: str | Path) -> Agreement:
        """Compare with float32 on the first CHECK_ROWS rows of a file; it is kept in `agreement` and told."""
        rows = self.read_rows(path)
        exact = PairClassifier.from_pretrained(folder, max_seq_length=self.cut, device="cpu", optimize=False)
        self.agreement = found = compare(self.classifier.predict(rows), exact.predict(rows))
        level, part = logging.INFO if found.is_enough else logging.WARNING, 100 * found.agreement
        message = f"agrees with float32 on {part:.1f} % of {found.num_rows} rows"
        logger.log(level, "%s %s; largest change %.4f", self.precision, message, found.largest_change)
        return found

    def read_rows(self, path: str) -> list[Any]:
        """The first texts of a file laid out like the training data; labels are not looked at."""
        known = {name: value for name, value in self.settings.items() if name in DataSettings.model_fields}
        settings = DataSettings(**{**known, "dev_file": [path], "max_eval_samples": CHECK_ROWS})
        source = resolve_source(settings, needs=("dev",))
        columns = source.columns_for(path, with_labels=False, header=self.classifier.header)
        try:
            pairs = source.read([path], columns, self.labels)
        except DataError as error:  # whose advice is for scripts that can be told another layout
            reason = first_line(error).partition("; ")[0]
            message = f"quantize_check: {reason}; it must be laid out like the training data"
            raise DataError(message) from error
        if not len(pairs):
            raise ConfigError(f"quantize_check: {path} holds no rows")
        texts = pairs.text_b or [""] * len(pairs)
        return list(zip(pairs.text_a, texts, strict=True)) if self.takes_pairs else list(pairs.text_a)


def join_rows(rows: Sequence[TokenRow]) -> Tokens:
    return Tokens(
        ids=np.concatenate([row.ids for row in rows]),
        offsets=offsets_of(np.array([len(row) for row in rows], np.int64)),
        first_lengths=np.array([row.first_length for row in rows], np.int32),
        truncated=np.array([row.truncated for row in rows], np.bool_),
    )


def compare(found: Sequence[Prediction], exact: Sequence[Prediction]) -> Agreement:
    same, largest = 0, 0.0
    for ours, theirs in zip(found, exact, strict=True):
        changes = [abs(ours.probabilities[label] - p) for label, p in theirs.probabilities.items()]
        change = max(changes or [abs(ours.score - theirs.score)])
        same += change <= 0.01 if theirs.label is None else ours.label == theirs.label
        largest = max(largest, change)
    return Agreement(len(exact), same / max(1, len(exact)), largest)


def load_predictor(config: ServeConfig) -> Predictor:
    """The model of `config`, verified and loaded. Raises CheckpointError or ConfigError."""
    assert config.model_dir is not None
    threads = set_threads(config.num_threads)
    folder = open_model(config.model_dir, verify=False)  # it is verified when its weights are read
    settings = model_settings(folder.path)
    cut = config.max_seq_length or settings.get("max_seq_length")
    if not config.max_seq_length and isinstance(cut, int):
        cut = min(cut, folder.max_length)
    classifier = PairClassifier.from_pretrained(
        folder.path,
        labels=config.labels,
        max_seq_length=cut,
        device=config.device,
        amp="off" if config.quantize else config.amp,
        quantize=config.quantize,
        max_batch_tokens=2**31,  # the queue cuts batches, not the scorer
    )
    takes_pairs = classifier.takes_pairs = classifier.takes_pairs is not False  # where nothing says so, pairs
    cut, num_texts = classifier.max_seq_length, 2 if takes_pairs else 1
    classifier.tokenizer.check_length(cut, num_texts=num_texts)
    limits = settle_limits(config, cut, num_texts)
    most = config.max_batch_tokens
    if most is not None and most < cut:
        raise ConfigError(f"max_batch_tokens {most} is below the cut of {cut} tokens: a row must fit")
    scorer, name = classifier.scorer, Path(config.model_dir).resolve().name
    kind = config.quantize or {"off": "float32"}.get(scorer.precision.name, scorer.precision.name)
    version = weights_digest(folder.path)[:12]
    predictor = Predictor(classifier, name, version, takes_pairs, limits, kind, settings, threads)
    if config.quantize_check is not None:
        predictor.read_rows(config.quantize_check)  # a wrong file is said at once
    kind += f" ({'as set' if config.quantize else scorer.precision.reason})"
    labels = f"{len(classifier.labels)} labels" if classifier.labels else "regression"
    facts = f"{labels}, device {scorer.device}, {threads} threads, {kind}, cut at {cut} tokens"
    logger.info("%s: %s", config.model_dir, facts)
    return predictor
