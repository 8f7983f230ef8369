"""Several processes on one machine: do they end where one ends, and what does a step's exchange cost?

    python benchmarks/processes.py
    python benchmarks/processes.py --only speed --steps 30

agreement: the embedded sample for 200 steps of 48 rows in float32, without dropout, in one process, in one
with two accumulated batches, in two and in three processes. What counts is how far the logits of the dev rows
are from those of the first run: accumulation alone changes the rounding, and processes should not change it
by much more.

speed: a step of two processes, each with a batch of its own and one thread: our sum of the gradients after
the backward pass, beside torch's DistributedDataParallel, which sends them while the pass still runs. They
take turns, step by step, on the same rows; the medians count.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bertpair import PairClassifier
from bertpair.data.batching import Batch
from bertpair.model.bert import BertClassifier, BertConfig
from bertpair.processes import Processes, joined
from bertpair.runtime import Precision, keep_freed_memory
from bertpair.training.optim import AdamW, parameter_groups
from bertpair.training.step import Objective, Stepper

ROOT = Path(__file__).resolve().parent.parent
RUNS = {  # processes, rows of a batch, batches of a step in each process
    "one process": (1, 48, 1),
    "one process, 2 accumulated batches": (1, 24, 2),
    "two processes": (2, 24, 1),
    "three processes": (3, 16, 1),
}
WARM_UP = 3  # steps that are not counted
ROWS, LENGTH = 16, 40  # of a batch
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=["agreement", "speed"])
    parser.add_argument("--steps", type=int, default=30, help="of each kind in `speed` (default: 30)")
    parser.add_argument("--accumulation", type=int, default=1, help="batches of such a step (default: 1)")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        with joined(60) as processes:
            speed(processes, arguments.steps, arguments.accumulation)
        return
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    if arguments.only != "speed":
        agreement()
    if arguments.only != "agreement":
        torchrun(2, Path(__file__), *sys.argv[1:])


def torchrun(size: int, script: Path, *flags: str, quiet: bool = False) -> None:
    """Run a script in `size` processes of one thread, or in this many of one, to its end."""
    started = [sys.executable]
    if size > 1:
        started += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(size)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    stream = subprocess.DEVNULL if quiet else None
    subprocess.run([*started, str(script), *flags], env=environment, check=True, stdout=stream, stderr=stream)


def agreement() -> None:
    with tempfile.TemporaryDirectory() as folder:
        logits = [dev_logits(Path(folder, str(number)), *run) for number, run in enumerate(RUNS.values())]
    differences = [float(np.abs(each - logits[0]).max()) for each in logits]
    print("200 steps of 48 rows | max |logit difference| on the dev rows | beside accumulation alone")
    for name, difference in zip(RUNS, differences, strict=True):
        print(f"{name} | {difference:.2e} | {difference / differences[1]:.2f}")


def dev_logits(folder: Path, size: int, batch: int, accumulation: int) -> NDArray[np.float32]:
    """Train there and return the logits of the final model, (rows, C)."""
    model, data = ROOT / "data" / "tiny-bert", ROOT / "data"
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (start := folder.with_name(f"{folder.name}-start")).mkdir()
    (start / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (start / "vocab.txt").write_bytes((model / "vocab.txt").read_bytes())
    flags = {"data_dir": data, "model_name_or_path": start, "from_scratch": True, "output_dir": folder}
    flags |= {"max_seq_length": 40, "learning_rate": 5e-4, "max_steps": 200, "amp": "off", "num_threads": 1}
    flags |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    flags |= {"save_steps": 0, "eval_strategy": "no", "load_best_model_at_end": False}
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    torchrun(size, ROOT / "train.py", *words, quiet=True)
    lines = (data / "dev.tsv").read_text(encoding="utf-8").splitlines()[1:]
    pairs = [(line.split("\t")[1], line.split("\t")[2]) for line in lines]
    return PairClassifier.from_pretrained(folder).logits(pairs)


class LossAlone(Processes):
    """For gradients that DistributedDataParallel has summed: of these two only the loss is left to send."""

    def sum_gradients(self, parameters: Sequence[Tensor], loss: Tensor) -> None:
        self.sum_([loss.div_(self.size)])


def speed(processes: Processes, num_steps: int, accumulation: int) -> None:
    """In each process: print the medians of both kinds of step, and how far their weights are apart."""
    torch.set_num_threads(1)
    keep_freed_memory()
    tiny = json.loads((ROOT / "data" / "tiny-bert" / "config.json").read_text(encoding="utf-8"))
    known = {name: value for name, value in tiny.items() if name in BertConfig.model_fields}
    mini = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}
    shapes = {"tiny": {**known, **without}, "MiniLM": {**mini, **without, "vocab_size": 30_522}}
    if processes.is_first:
        print(
            f"two processes, {accumulation} × {ROWS} rows of {LENGTH} tokens each, {num_steps} steps of each"
        )
        print("network | ours ms | DistributedDataParallel ms | ours / theirs | weights apart", flush=True)
    for name, shape in shapes.items():
        ours, theirs, apart = compare(processes, BertConfig(**shape), num_steps, accumulation)
        if processes.is_first:
            print(f"{name} | {ours:.1f} | {theirs:.1f} | {ours / theirs:.2f} | {apart:.1e}", flush=True)


def compare(
    processes: Processes, config: BertConfig, num_steps: int, accumulation: int
) -> tuple[float, float, float]:
    """Milliseconds of our step and of DistributedDataParallel's, and how far the weights are apart."""
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        models.append(BertClassifier(config).train())
    parallel = DistributedDataParallel(models[1])
    ours = stepper(models[0], models[0], processes)
    theirs = stepper(parallel, models[1], LossAlone(processes.rank, processes.size))
    draw, weight = torch.Generator().manual_seed(processes.rank), float(ROWS * accumulation * processes.size)
    seconds: list[list[float]] = [[], []]
    for number in range(1, WARM_UP + num_steps + 1):
        batches = [random_batch(config, draw) for _ in range(accumulation)]
        rows = np.arange(ROWS * accumulation)
        for kind in (0, 1) if number % 2 else (1, 0):
            dist.barrier()
            began = time.perf_counter()
            if kind == 0:
                ours.step(number, rows, batches, denominator=weight, learning_rate=1e-5)
            else:  # it averages over the processes, and we need the sum
                mean = weight / processes.size
                theirs.step(number, rows, held_back(parallel, batches), denominator=mean, learning_rate=1e-5)
            seconds[kind].append(time.perf_counter() - began)
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    apart = max(float((one - other).detach().abs().max()) for one, other in pairs)
    first, second = (1000 * statistics.median(each[WARM_UP:]) for each in seconds)
    return first, second, apart


def stepper(
    run: BertClassifier | DistributedDataParallel, model: BertClassifier, processes: Processes
) -> Stepper:
    optimizer = AdamW(parameter_groups(model, 0.01), lr=1e-5)
    given = {"device": CPU, "precision": Precision("off", ""), "max_grad_norm": 1.0, "processes": processes}
    return Stepper(run, optimizer, Objective(False), **given)  # type: ignore[arg-type]


def random_batch(config: BertConfig, draw: torch.Generator) -> Batch:
    ids = torch.randint(5, config.vocab_size, (ROWS, LENGTH), generator=draw)
    targets = torch.randint(0, 3, (ROWS,), generator=draw)
    return Batch(np.arange(ROWS), ids, torch.zeros_like(ids), None, targets, num_tokens=ids.numel())


def held_back(parallel: DistributedDataParallel, batches: list[Batch]) -> Iterator[Batch]:
    """The batches of a step; gradients are sent with the last one only."""
    with parallel.no_sync():
        yield from batches[:-1]
    yield batches[-1]


if __name__ == "__main__":
    main()
