"""Scoring rows of token ids with a live PyTorch model.

Rows run longest first in batches cut by padded tokens, and come back in the order they were given:
what a row rides with changes its logits by rounding only.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from bertpair.data.batching import pad_batch, token_budget_batches
from bertpair.data.tokenizer import Tokens
from bertpair.model.families import Network
from bertpair.model.packed import PackedClassifier
from bertpair.processes import ALONE, Processes
from bertpair.runtime import Precision, survive_fork

BATCH_TOKENS = 4096  # of a batch, where nobody says how much memory there is


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A live model with what running it takes; scores rows of token ids.

    Several `processes` share the batches, and each has all the logits in the end, as one alone would.
    """

    model: Network | PackedClassifier
    pad_id: int
    device: torch.device
    precision: Precision
    max_length: int
    max_batch_tokens: int = BATCH_TOKENS  # padded
    pad_to_multiple_of: int = 8
    processes: Processes = ALONE

    def logits(self, tokens: Tokens, on_rows: Callable[[int], None] | None = None) -> npt.NDArray[np.float32]:
        """Logits in the order of `tokens`, (rows, C). Runs in eval mode; the model's mode is put back.

        `on_rows(n)` is called after each batch of n rows. Raises StoppedError when the stop flag is set. For
        all processes.
        """
        survive_fork()
        batches = token_budget_batches(tokens.lengths, self.max_batch_tokens, self.pad_to_multiple_of)
        # Padding is free of work in a packed model, and rows of one length need no mask.
        multiple = 1 if isinstance(self.model, PackedClassifier) else self.pad_to_multiple_of
        rank, size = self.processes.rank, self.processes.size
        found, own = [], batches[rank::size]
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode(), self.precision.autocast(self.device):
                for start in range(0, len(batches), size):
                    self.processes.raise_if_stopped()
                    for rows in batches[start + rank : start + rank + 1]:  # the last ones may not be for all
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
                        on_rows(sum(map(len, batches[start : start + size])))
        finally:
            self.model.train(was_training)
        out = np.zeros((len(tokens), self.model.config.num_labels), np.float32)
        if own:  # one copy: each would wait for the device
            out[np.concatenate(own)] = torch.cat(found).cpu().numpy()
        self.processes.sum_([torch.from_numpy(out)])  # of zeros and one process's logits
        return out


def softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Row-wise softmax of (rows, C) in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    exponentials = np.exp(shifted)
    return np.asarray(exponentials / exponentials.sum(axis=-1, keepdims=True))
