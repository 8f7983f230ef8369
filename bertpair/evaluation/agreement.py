"""How far a faster way of computing agrees with float32, on pairs of a file or of the caller's."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bertpair.data.source import resolve_source
from bertpair.errors import ConfigError, DataError, first_line
from bertpair.evaluation.scorer import softmax
from bertpair.settings.data import DataSettings

logger = logging.getLogger(__name__)

CHECK_ROWS = 256


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How answers compare with float32's on `num_rows` rows."""

    num_rows: int
    agreement: float  # part of the rows with the same label; for a regression, 1 within rounding of 0.01
    largest_change: float  # of a probability, or of the value

    @property
    def is_enough(self) -> bool:
        return self.agreement >= 0.98

    def tell(self, what: str) -> None:
        """Into the log, as a warning where it is not enough."""
        level, part = logging.INFO if self.is_enough else logging.WARNING, 100 * self.agreement
        message = f"agrees with float32 on {part:.1f} % of {self.num_rows} rows"
        logger.log(level, "%s %s; largest change %.4f", what, message, self.largest_change)


def compare(found: npt.NDArray[np.float32], exact: npt.NDArray[np.float32], *, regression: bool) -> Agreement:
    """Logits (rows, C) beside float32's; of a regression, values (rows, 1)."""
    ours, theirs = (found, exact) if regression else (softmax(found), softmax(exact))
    change = np.abs(ours - theirs).max(axis=1)
    same = change <= 0.01 if regression else found.argmax(axis=1) == exact.argmax(axis=1)
    return Agreement(len(exact), float(same.mean()), float(change.max()))


def read_texts(
    path: str | Path | None,
    name: str,
    settings: Mapping[str, Any],
    *,
    header: tuple[str, ...] | None,
    labels: Sequence[str] | None,
    takes_pairs: bool,
    limit: int | None = None,
) -> list[Any]:
    """The texts of a file laid out like the training data, or of that (`path` None); without the labels.

    `settings` are the model's, as are `header` and `labels`, which tell a header from a row. ConfigError or
    DataError in the name of the setting `name`.
    """
    known = {name: value for name, value in settings.items() if name in DataSettings.model_fields}
    kind = "train" if path is None else "dev"
    given: dict[str, Any] = {"max_eval_samples": limit, "group_column": None}
    given |= {} if path is None else {"dev_file": [path], "file_format": "auto"}
    source = resolve_source(DataSettings(**{**known, **given}), needs=(kind,))
    files = source.train_files if path is None else source.dev_files
    columns = source.columns_for(files[0], with_labels=False, header=header)
    try:
        pairs = source.read(files, columns, labels)
    except DataError as error:  # whose advice is for scripts that can be told another layout
        reason = first_line(error).partition("; ")[0]
        raise DataError(f"{name}: {reason}; it must be laid out like the training data") from error
    if not len(pairs):
        raise ConfigError(f"{name}: {files[0]} holds no rows")
    texts = pairs.text_b or [""] * len(pairs)
    return list(zip(pairs.text_a, texts, strict=True)) if takes_pairs else list(pairs.text_a)
