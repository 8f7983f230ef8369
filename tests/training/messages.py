"""One of several processes that tell each other things, and write down what they then know.

    RANK=… WORLD_SIZE=… MASTER_ADDR=… MASTER_PORT=… python messages.py FOLDER

`own_…` is what a process brings: a test makes the same for each of them and computes by itself what they must
have in the end.
"""

import sys
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import TINY_CONFIG
from torch import Tensor

from bertpair.console import stop_flag
from bertpair.data.dataset import Pairs, Split
from bertpair.data.tokenizer import Tokens
from bertpair.errors import BertpairError, DataError, StoppedError
from bertpair.evaluation.measure import evaluate_split
from bertpair.evaluation.scorer import Scorer
from bertpair.model.bert import BertClassifier, BertConfig
from bertpair.processes import ALONE, BUCKET, Processes, joined
from bertpair.runtime import Precision

LABELS = ("no", "yes", "maybe")
ROWS = (0, 1, 2, 5, 50)
BUDGETS = (16, 4096)  # padded tokens of a batch: a row or two, and all rows in one batch


def own_bytes(rank: int) -> list[bytes]:
    """Unequal, empty, all empty, with zeros at the end, long."""
    return [b"abc"[:rank], b"", b"\0" * (3 - rank), bytes(range(256)) * 1000 * rank]


def own_numbers(rank: int) -> list[Tensor]:
    """Of many shapes, types and strides."""
    draw = torch.Generator().manual_seed(rank)
    wide = torch.randn(6, 8, generator=draw)
    return [
        torch.randn((), generator=draw),
        torch.randn(0, 3, generator=draw),
        torch.randn(7, 5, 3, generator=draw).transpose(0, 2),
        torch.randn(1000, generator=draw, dtype=torch.float64)[::3],
        torch.randn(4, generator=draw, dtype=torch.float64),
        wide[:, 1:4],
        torch.randint(-9, 9, (4, 4), generator=draw).t(),
        torch.randn(11, generator=draw),
    ]


def own_lone(rank: int) -> list[Tensor]:
    """Each summed by itself."""
    draw = torch.Generator().manual_seed(rank)
    return [torch.randn(5, 7, generator=draw).t(), torch.zeros(0), torch.randn((), generator=draw)]


def own_large(rank: int) -> list[Tensor]:
    """Above a bucket, a whole one, one in two parts, the rest of one: whole numbers, that sum exactly."""
    sizes = (5, BUCKET + 3, BUCKET, BUCKET - 7, 7, 1)
    return [torch.arange(size, dtype=torch.int32).remainder(997).float().add_(rank) for size in sizes]


def own_weights(rank: int) -> list[Tensor]:
    """A parameter, strides that cross, whole numbers, one number."""
    draw = torch.Generator().manual_seed(rank)
    weight = torch.nn.Parameter(torch.randn(3, 4, generator=draw))
    across, ids = torch.randn(5, 3, generator=draw).t(), torch.randint(0, 99, (4,), generator=draw)
    return [weight, across, ids, torch.tensor(rank + 0.5)]


def scorer(max_batch_tokens: int, processes: Processes = ALONE) -> Scorer:
    """Of a tiny model that is the same in every process."""
    torch.manual_seed(5)
    names = BertConfig.model_fields
    known = {name: value for name, value in TINY_CONFIG.items() if name in names}
    model = BertClassifier(BertConfig(**known, vocab_size=100, num_labels=3))
    cpu, float32 = torch.device("cpu"), Precision("off", "test")
    return Scorer(model, 0, cpu, float32, 32, max_batch_tokens, processes=processes)


def rows(count: int) -> Split:
    """Rows of 3 to 30 tokens with their labels."""
    draw = np.random.default_rng(count)
    lengths = draw.integers(3, 31, count)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = draw.integers(5, 100, offsets[-1]).astype(np.int32)
    tokens = Tokens(ids, offsets, lengths // 2, np.zeros(count, np.bool_))
    nothing, zeros = ["" for _ in range(count)], np.zeros(count, np.int32)
    pairs = Pairs(nothing, nothing, None, ("rows.tsv",), zeros, zeros, None)
    return Split(pairs, tokens, draw.integers(0, 3, count))


def tell(processes: Processes) -> dict[str, Any]:
    """What this process knows after each of the messages."""
    rank, known = processes.rank, dict[str, Any]()
    known["gathered"] = [processes.gather(data) for data in own_bytes(rank)]
    known["shared"] = processes.share({"мир": [1, None, 0.1, "\n"]} if rank == 0 else {"other": rank})
    known["numbers"], known["weights"], large = own_numbers(rank), own_weights(rank), own_large(rank)
    processes.sum_(known["numbers"])
    processes.sum_(large)
    known["large"] = [digest(each) for each in large]
    processes.copy_from_first(known["weights"])
    known["lone"] = own_lone(rank)
    for each in known["lone"]:
        processes.sum_([each])
    processes.check_same("data", "the same")
    known["made"] = processes.all_or_none(lambda: make(rank, []))
    known["faults"] = [
        fault(lambda: processes.check_same("dev data", "other" if rank in others else "one"))  # noqa: B023
        for others in ([1], [1, 2], [0])
    ]
    known["faults"] += [
        fault(lambda: processes.all_or_none(lambda: make(rank, failing)))  # noqa: B023
        for failing in ([0], [1, 2])
    ]
    known["logits"] = {
        (count, budget): scorer(budget, processes).logits(rows(count).tokens)
        for count in ROWS
        for budget in BUDGETS
    }
    known["figures"] = figures(scorer(16, processes))
    processes.raise_if_stopped()
    if rank == 2:
        stop_flag.request(15)
    try:
        processes.raise_if_stopped()
    except StoppedError as stopped:
        known["stopped"] = stopped.signum
    return known


def figures(scorer: Scorer) -> dict[str, float | str]:
    return evaluate_split(scorer, rows(50), LABELS).figures


def digest(tensor: Tensor) -> str:
    return sha256(tensor.numpy().tobytes()).hexdigest()


def fault(work: Callable[[], object]) -> str:
    """What it raises: the kind of error, and what it says."""
    try:
        work()
    except BertpairError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def make(rank: int, failing: Sequence[int]) -> str:
    """Fails in some processes."""
    if rank in failing:
        raise DataError(f"{rank} cannot read this")
    return f"made by {rank}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    with joined(30) as processes:
        torch.save(tell(processes), Path(sys.argv[1], f"{processes.rank}.pt"))
