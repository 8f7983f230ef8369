"""The model as a server wants it: rows of token ids in, predictions out, and what a client may know of it.

`encode` and `check_agreement` may run on any thread, `run` and `time_batch` belong to the model's own.
"""

import dataclasses
import logging
import math
import timeit
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from bertpair.checkpoints.checkpoint import open_model, weights_digest
from bertpair.data.batching import fill_up
from bertpair.data.tokenizer import Tokens, offsets_of
from bertpair.errors import ConfigError
from bertpair.evaluation.agreement import CHECK_ROWS, Agreement, compare, read_texts
from bertpair.evaluation.classifier import PairClassifier, Prediction
from bertpair.evaluation.openvino import OpenVINOScorer
from bertpair.runtime import set_threads
from bertpair.serving.batcher import ROUND_UP
from bertpair.serving.requests import RequestError
from bertpair.settings.serve import RequestLimits, ServeConfig, settle_limits
from bertpair.settings.stored import model_settings

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TokenRow:
    """One row's token ids, special tokens included."""

    ids: npt.NDArray[np.int32]
    first_length: int
    truncated: bool

    def __len__(self) -> int:
        return len(self.ids)


@dataclasses.dataclass
class Predictor:
    """A loaded model."""

    classifier: PairClassifier
    name: str
    version: str  # the first 12 hex digits of the weights' sha256
    takes_pairs: bool
    limits: RequestLimits
    engine: Literal["torch", "openvino"]
    precision: str  # float32, bf16, fp16, int8, or int8 and bf16
    settings: Mapping[str, Any]  # those it was trained with
    num_threads: int

    @property
    def agreement(self) -> Agreement | None:
        """With float32, where it was measured."""
        return self.classifier.agreement

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

    @property
    def full_batch_tokens(self) -> int:
        """Of a batch that should be allowed whatever its time: what keeps OpenVINO's requests busy."""
        scorer = self.classifier.scorer
        return scorer.full_tokens if isinstance(scorer, OpenVINOScorer) else 0

    def warm_shapes(self, max_tokens: int, max_rows: int) -> Iterator[list[int]]:
        """Lengths of batches that bring what a kernel is kept for: each length of a row alone with OpenVINO,
        which takes little time for other shapes; with PyTorch every number of tokens and of rows."""
        if self.engine == "openvino":
            yield from ([n] for n in sorted({min(fill_up(n, 2), self.cut) for n in range(1, self.cut + 1)}))
            return
        for count in sorted({fill_up(count) for count in range(1, max_tokens + 1)}):
            whole, rest = divmod(count, self.cut)
            yield [self.cut] * whole + [rest] * (rest > 0)
        most = min(max_rows, max_tokens // ROUND_UP)  # of the shortest that the queue counts
        for count in sorted({fill_up(count) for count in range(1, most + 1)}):
            yield [ROUND_UP] * min(count, max_rows)

    def check_agreement(self, folder: str | Path, texts: list[Any]) -> Agreement:
        """Compare with float32 on these texts; it is kept in `agreement` and told."""
        exact = PairClassifier.from_pretrained(folder, max_seq_length=self.cut, device="cpu", optimize=False)
        logits = (model.logits(texts) for model in (self.classifier, exact))
        found = compare(*logits, regression=self.labels is None)
        self.classifier.agreement = found
        found.tell(self.precision)
        return found

    def read_check(self, path: str) -> list[Any]:
        """The first texts of a file laid out like the training data."""
        return read_texts(
            path,
            "quantize_check",
            self.settings,
            header=self.classifier.header,
            labels=self.labels,
            takes_pairs=self.takes_pairs,
            limit=CHECK_ROWS,
        )


def join_rows(rows: Sequence[TokenRow]) -> Tokens:
    return Tokens(
        ids=np.concatenate([row.ids for row in rows]),
        offsets=offsets_of(np.array([len(row) for row in rows], np.int64)),
        first_lengths=np.array([row.first_length for row in rows], np.int32),
        truncated=np.array([row.truncated for row in rows], np.bool_),
    )


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
        amp=config.amp,
        engine=config.engine,
        quantize=config.quantize,
        calibration_pairs=config.calibration_file,
        quantize_check=config.quantize_check if config.quantize else None,
        temperature=config.temperature,
        threshold=config.threshold,
        max_batch_tokens=2**31,  # the queue cuts batches, not the scorer
    )
    takes_pairs = classifier.takes_pairs = classifier.takes_pairs is not False  # where nothing says so, pairs
    cut, num_texts = classifier.max_seq_length, 2 if takes_pairs else 1
    classifier.tokenizer.check_length(cut, num_texts=num_texts)
    limits = settle_limits(config, cut, num_texts)
    most = config.max_batch_tokens
    if most is not None and most < cut:
        raise ConfigError(f"max_batch_tokens {most} is below the cut of {cut} tokens: a row must fit")
    if config.quantize and classifier.agreement is None:
        place = f"the int8 network in {folder.path}"
        raise ConfigError(f"quantize_check must be set: {place} was not compared with float32 yet")
    scorer, name = classifier.scorer, Path(config.model_dir).resolve().name
    kinds = (config.quantize, scorer.precision.name if scorer.precision.name != "off" else None)
    kind = " and ".join(each for each in kinds if each) or "float32"
    engine: Literal["torch", "openvino"] = "openvino" if config.runs_openvino else "torch"
    version = weights_digest(folder.path)[:12]
    predictor = Predictor(classifier, name, version, takes_pairs, limits, engine, kind, settings, threads)
    if config.quantize_check is not None and not config.quantize:
        predictor.read_check(config.quantize_check)  # a wrong file is said at once
    kind += f" ({'as set' if config.quantize else scorer.precision.reason})"
    labels = f"{len(classifier.labels)} labels" if classifier.labels else "regression"
    kind = f"OpenVINO {kind}" if config.runs_openvino else kind
    facts = f"{labels}, device {scorer.device}, {threads} threads, {kind}, cut at {cut} tokens"
    logger.info("%s: %s", config.model_dir, facts)
    return predictor
