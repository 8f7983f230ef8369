"""A model folder → the network that OpenVINO runs, in float32 or with 8-bit integers, kept in derived/.

int8 is static, by NNCF: weights and inputs of the linear layers have 8 bits, whose ranges are found once on
pairs of the user's (https://docs.openvino.ai, "Post-training quantization"). Pairs that it has not seen then
show how well it agrees with float32.
"""

import dataclasses
import hashlib
import json
import logging
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bertpair import __version__
from bertpair.checkpoints.atomic import Staging
from bertpair.checkpoints.checkpoint import file_digest, weights_digest
from bertpair.checkpoints.derived import derive
from bertpair.data.tokenizer import Tokenizer, Tokens, offsets_of
from bertpair.errors import CheckpointError, ConfigError, DataError, first_line
from bertpair.evaluation import openvino
from bertpair.evaluation.agreement import CHECK_ROWS, Agreement, compare, read_texts
from bertpair.evaluation.openvino import MODEL, WEIGHTS, OpenVINOScorer
from bertpair.evaluation.rows import Pairs, as_rows, split_pairs
from bertpair.evaluation.scorer import Scorer
from bertpair.model.config import ModelFolder
from bertpair.model.pretrained import load_model
from bertpair.runtime import Precision, has_vnni
from bertpair.settings.stored import model_settings

logger = logging.getLogger(__name__)

CALIBRATION_ROWS = 200
FLAGS = {"calibration": "calibration_file", "check": "quantize_check"}
EXACT = Precision("off", "")
WRONG = "converted, this network gives other answers"
TOLERANCE = 1e-3  # of logits in float32, times the largest: a rounding is some 1e-6, a wrong network far more


class Samples(NamedTuple):
    """Pairs that int8 needs, each a file or rows of texts; None: see `_choose`."""

    calibration: list[Any] | str | Path | None
    check: list[Any] | str | Path | None
    takes_pairs: bool | None

    @classmethod
    def read(
        cls,
        calibration: Pairs | str | Path | None,
        check: Pairs | str | Path | None,
        takes_pairs: bool | None,
    ) -> "Samples":
        """From what a caller gave: an iterator gives its pairs once."""
        rows, others = (
            each if each is None or isinstance(each, str | Path) else as_rows(each, takes_pairs)
            for each in (calibration, check)
        )
        return cls(rows, others, takes_pairs)


@dataclasses.dataclass(frozen=True)
class Conversion:
    """One model folder, and how its network is to be run."""

    folder: ModelFolder
    tokenizer: Tokenizer
    precision: Precision
    max_length: int
    quantize: str | None
    samples: Samples

    def open(self, max_batch_tokens: int) -> tuple[OpenVINOScorer, Agreement | None]:
        """The converted network, made if need be, and for int8 how it agrees with float32, if that is known.

        Raises ConfigError without the library or the pairs, CheckpointError where nothing can be written.
        """
        openvino.load_library("openvino", "engine openvino")
        if self.quantize and not has_vnni():
            reason = "this processor has no instructions for it (VNNI)"
            logger.warning("quantize int8: %s; float32 is about as fast here", reason)
        made_of: dict[str, Any] = {
            "weights": weights_digest(self.folder.path),
            "config": file_digest(self.folder.path / "config.json"),
            "bertpair": __version__,
            "openvino": version("openvino"),
        }
        name = "openvino"
        if self.quantize:
            name = f"openvino-{self.quantize}" + ("-bf16" if self.precision.name == "bf16" else "")
            made_of |= {"max_seq_length": self.max_length, "vnni": has_vnni(), **self._digests()}
            with suppress(PackageNotFoundError):  # who only serves what is there does not need it
                made_of["nncf"] = version("nncf")
        path, manifest = derive(self.folder.path, name, made_of, self._make)
        scorer = self._scorer(openvino.read(path), max_batch_tokens)
        if scorer.num_labels != (expected := self.folder.config.num_labels):
            raise CheckpointError(f"{path}: found {scorer.num_labels} labels, the model has {expected}")
        found = manifest.meta.get("agreement")
        agreement = Agreement(**found) if found else None
        if agreement is not None:
            agreement.tell("int8")
        return scorer, agreement

    def _scorer(self, model: Any, max_batch_tokens: int) -> OpenVINOScorer:
        return OpenVINOScorer(
            model,
            pad_id=self.tokenizer.pad_id,
            precision=self.precision,
            max_length=self.max_length,
            max_batch_tokens=max_batch_tokens,
            num_threads=torch.get_num_threads(),
        )

    def _digests(self) -> dict[str, str]:
        """Of the pairs that were given; others do not have to be looked at again."""
        given = {"calibration": self.samples.calibration, "check": self.samples.check}
        return {name: self._digest(name, value) for name, value in given.items() if value is not None}

    def _digest(self, name: str, value: Any) -> str:
        if isinstance(value, str | Path):
            try:
                return file_digest(value)
            except OSError as error:
                raise DataError(f"{FLAGS[name]}: {value}: {error.strerror or error}") from error
        return hashlib.sha256(json.dumps(self._rows(name, value)).encode()).hexdigest()

    def _rows(self, name: str, value: Any) -> list[tuple[str, ...]]:
        """The texts of each row of a file, or of pairs; of the training file where the value is None."""
        takes_pairs = self.samples.takes_pairs
        if value is None or isinstance(value, str | Path):
            try:
                value = read_texts(
                    value,
                    FLAGS[name],
                    model_settings(self.folder.path),
                    header=self.folder.header,
                    labels=self.folder.labels,
                    takes_pairs=takes_pairs is not False,
                )
            except DataError as error:
                if value is not None:
                    raise
                advice = "name a file with --calibration_file, or give calibration_pairs in Python"
                raise DataError(
                    f"quantize int8 needs pairs to be calibrated with: {error}; {advice}"
                ) from error
        text_a, text_b = split_pairs(as_rows(value, takes_pairs), takes_pairs)
        return [(a,) for a in text_a] if text_b is None else list(zip(text_a, text_b, strict=True))

    def _choose(self) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
        """Rows to calibrate with, and others to check with: none where too few were given in Python."""
        calibration, check = self.samples.calibration, self.samples.check
        rows = self._rows("calibration", calibration)
        rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
        known = set(rows[:CALIBRATION_ROWS])
        rest = rows[CALIBRATION_ROWS:] if check is None else self._rows("check", check)
        rest = [row for row in rest if row not in known][:CHECK_ROWS]
        if len(rest) == CHECK_ROWS:
            return rows[:CALIBRATION_ROWS], rest
        needs = f"at least {CHECK_ROWS} pairs besides those it is calibrated with, found {len(rest)}"
        if check is None and not (calibration is None or isinstance(calibration, str | Path)):
            logger.warning("int8 is not compared with float32: that needs %s; give quantize_check", needs)
            return rows[:CALIBRATION_ROWS], []
        raise ConfigError(f"quantize_check: to compare int8 with float32 takes {needs}; name a larger file")

    def _make(self, staging: Staging) -> dict[str, Any]:
        """Convert the network into a folder; what its manifest is to say besides what it is made of."""
        kind = self.quantize or "float32"
        logger.info("%s: converting to OpenVINO, %s; a large model takes minutes", self.folder.path, kind)
        calibration, check = self._choose() if self.quantize else ([], [])
        network, _ = load_model(self.folder, num_labels=self.folder.config.num_labels, require_head=True)
        exact = Scorer(network.eval(), self.tokenizer.pad_id, torch.device("cpu"), EXACT, self.max_length)
        model = openvino.convert(network)
        said: dict[str, Any] = {"float32_change": self._check(model, exact)}
        if self.quantize:
            tokens = self._encode(calibration)
            model = openvino.quantise(model, tokens, self.tokenizer.pad_id, has_vnni=has_vnni())
        openvino.write(model, staging.folder)
        for name in (MODEL, WEIGHTS):
            staging.adopt(name)
        said |= {"calibration_rows": len(calibration), "agreement": None}
        if check:
            tokens = self._encode(check)
            found, wanted = (each.logits(tokens) for each in (self._scorer(model, 4096), exact))
            agreement = compare(found, wanted, regression=self.folder.regression)
            said["agreement"] = dataclasses.asdict(agreement)
        return said

    def _encode(self, rows: list[tuple[str, ...]]) -> Tokens:
        text_a, *text_b = ([*column] for column in zip(*rows, strict=True))
        return self.tokenizer.encode(text_a, text_b[0] if text_b else None, self.max_length)

    def _check(self, model: Any, exact: Scorer) -> float:
        """The largest change of a logit; ConfigError where that is more than rounding."""
        generator, longest = np.random.default_rng(0), min(self.max_length, 40)
        lengths = np.array([longest, 3, longest, -(-longest // 2), 1])
        ids = generator.integers(0, self.folder.config.vocab_size, lengths.sum(), np.int32)
        tokens = Tokens(ids, offsets_of(lengths), lengths // 2, np.zeros(len(lengths), np.bool_))
        wanted = exact.logits(tokens)
        try:
            found = dataclasses.replace(self, precision=EXACT)._scorer(model, 4096).logits(tokens)
        except (RuntimeError, ValueError) as error:  # which, depends on what was lost in the conversion
            raise ConfigError(
                f"engine openvino: {WRONG} ({first_line(error):.160}); use engine torch"
            ) from error
        change = float(np.abs(found - wanted).max())
        if not change <= TOLERANCE * max(1, np.abs(wanted).max()):
            raise ConfigError(f"engine openvino: {WRONG}; use engine torch")
        return change
