"""What bf16 brings on this processor, by the model's size: the figures behind the rule of `amp auto`.

    python benchmarks/precision.py

For each hidden size (heads of 64, the feed-forward part four times as wide, random weights, 40 tokens a
row): one training step of 16 rows by the stepper, and one served batch of 16 rows and one of a
single row by the prepared network. float32 and bf16 alternate; the quicker of the rounds counts.
"""

import argparse
import platform
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bertpair.data.batching import Batch
from bertpair.model.bert import BertClassifier, BertConfig
from bertpair.model.packed import PackedClassifier
from bertpair.runtime import Precision, cpu_bf16_flag, keep_freed_memory
from bertpair.training.optim import AdamW, parameter_groups
from bertpair.training.step import Objective, Stepper

CPU = torch.device("cpu")
LENGTH = 40


def main() -> None:
    parser = argparse.ArgumentParser(description="bf16 beside float32 on this processor, by size")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256, 384, 512, 768])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    keep_freed_memory()
    threads = torch.get_num_threads()
    print(f"{date.today()}, {platform.machine()}, {threads} threads, torch {torch.__version__}")
    print(f"fast bf16: {cpu_bf16_flag()}; {arguments.layers} layers; float32 ms / bf16 ms = ratio")
    print("hidden_size | training step of 16 | served batch of 16 | served row")
    for hidden_size in arguments.sizes:
        works = [training_step, lambda *given: served(16, *given), lambda *given: served(1, *given)]
        cells = [compare(work, hidden_size, arguments.layers, arguments.rounds) for work in works]
        print(f"{hidden_size} | " + " | ".join(cells), flush=True)


def compare(
    work: Callable[[BertConfig, Precision], Callable[[], object]], hidden_size: int, layers: int, rounds: int
) -> str:
    config = BertConfig(
        vocab_size=8000,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden_size // 64),
        intermediate_size=4 * hidden_size,
        num_labels=3,
    )
    runs = [work(config, Precision(name, "")) for name in ("off", "bf16")]
    seconds = [[timed(run) for run in runs] for _ in range(1 + rounds)][1:]  # the first warms up
    float32, bf16 = (min(column) for column in zip(*seconds, strict=True))
    return f"{1000 * float32:.1f} / {1000 * bf16:.1f} = {float32 / bf16:.2f}"


def timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def training_step(config: BertConfig, precision: Precision) -> Callable[[], object]:
    torch.manual_seed(1)
    model = BertClassifier(config).train()
    optimizer = AdamW(parameter_groups(model, 0.01), lr=1e-5)
    stepper = Stepper(model, optimizer, Objective(False), device=CPU, precision=precision, max_grad_norm=1.0)
    rows = np.arange(16)
    ids = torch.randint(5, config.vocab_size, (16, LENGTH))
    batch = Batch(rows, ids, torch.zeros_like(ids), None, torch.arange(16) % 3, num_tokens=ids.numel())

    def step() -> None:
        stepper.step(1, rows, [batch], denominator=16, learning_rate=1e-5)

    return step


def served(num_rows: int, config: BertConfig, precision: Precision) -> Callable[[], object]:
    torch.manual_seed(1)
    model = PackedClassifier(BertClassifier(config).eval(), precision.dtype).eval()
    ids = torch.randint(5, config.vocab_size, (num_rows, LENGTH))

    def answer() -> None:
        with torch.inference_mode():
            model(ids)

    return answer


if __name__ == "__main__":
    main()
