"""Training beside Hugging Face's Trainer and sentence-transformers' CrossEncoder: seconds a step and memory.

    pip install transformers accelerate datasets sentence-transformers
    python benchmarks/peers.py

All train the same network of mBERT's size (random weights; the sample's vocabulary, filled up to mBERT's
119,547 entries) on the embedded sample, with the same batch size, cut, optimizer and number of threads. Each
run is a process of its own, and the programs take turns. The first steps of a run are not counted; the table
shows the median of the others over all turns.

  trainer   what run_glue.py does when nobody tunes it: every row padded to the cut, random batches
  tuned     the best of Trainer's own switches: padding per batch, groups of like length, fused AdamW
  cross     CrossEncoderTrainer with CrossEntropyLoss; it pads each batch to its longest row
  bertpair  this library's defaults; `compact` adds compact_vocabulary
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
WARM_UP = 3  # steps of a run that are not counted
MBERT = {
    "architectures": ["BertForSequenceClassification"],
    "model_type": "bert",
    "vocab_size": 119_547,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "pad_token_id": 0,
    "num_labels": 3,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--turns", type=int, default=2, help="runs of each program (default: 2)")
    parser.add_argument("--steps", type=int, default=12, help="steps of a run (default: 12)")
    parser.add_argument("--batch", type=int, default=16, help="rows of a step (default: 16)")
    parser.add_argument("--cut", type=int, default=40, help="tokens of a pair at most (default: 40)")
    parser.add_argument("--bf16", action="store_true", help="mixed precision (default: float32)")
    parser.add_argument("--run", choices=PROGRAMS, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        seconds = PROGRAMS[arguments.run](arguments)
        print(json.dumps({"seconds": seconds[WARM_UP:], "peak_gb": peak_gb()}))
        return
    with tempfile.TemporaryDirectory(prefix="bertpair-peers-") as folder:
        arguments.model = write_model(Path(folder) / "model")
        compare(arguments)


def write_model(folder: Path) -> Path:
    """A folder with mBERT's shape, random weights and a vocabulary as long as mBERT's."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    folder.mkdir()
    words = (ROOT / "data/tiny-bert/vocab.txt").read_text(encoding="utf-8").splitlines()
    words += [f"[unused{i}]" for i in range(MBERT["vocab_size"] - len(words))]  # type: ignore[operator]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    torch.manual_seed(1)
    BertForSequenceClassification(BertConfig(**MBERT)).save_pretrained(folder)
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def compare(arguments: argparse.Namespace) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in arguments.programs}
    memory: dict[str, float] = {}
    given = [f"--{name}={getattr(arguments, name)}" for name in ("model", "steps", "batch", "cut")]
    given += ["--bf16"] * arguments.bf16
    for _ in range(arguments.turns):
        for name in arguments.programs:
            command = [sys.executable, __file__, "--run", name, *given]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            seconds[name] += found["seconds"]
            memory[name] = max(memory.get(name, 0), found["peak_gb"])
    precision = "bf16" if arguments.bf16 else "float32"
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, {precision}")
    print(f"batch {arguments.batch}, cut {arguments.cut}, {arguments.turns} turns of {arguments.steps} steps")
    print("| program | s/step | pairs/s | times as long | peak memory, GB |\n|---|---|---|---|---|")
    median = {name: statistics.median(each) for name, each in seconds.items()}
    best = median.get("bertpair", min(median.values()))
    for name, each in median.items():
        rate = arguments.batch / each
        print(f"| {name} | {each:.3f} | {rate:.1f} | {each / best:.2f} | {memory[name]:.2f} |")


def rows(limit: int) -> tuple[list[str], list[str], list[int]]:
    """Texts and label ids of the sample's first training rows."""
    lines = (ROOT / "data/train.tsv").read_text(encoding="utf-8").splitlines()[1 : limit + 1]
    _, text_a, text_b, label = zip(*(line.split("\t") for line in lines), strict=True)
    ids = {name: i for i, name in enumerate(sorted(set(label)))}
    return list(text_a), list(text_b), [ids[name] for name in label]


def run_bertpair(arguments: argparse.Namespace, compact: bool = False) -> list[float]:
    from bertpair import Config, train

    with tempfile.TemporaryDirectory() as folder:
        train(
            Config(
                model_name_or_path=str(arguments.model),
                data_dir=str(ROOT / "data"),
                do_train=True,
                do_eval=False,
                eval_strategy="no",
                output_dir=folder,
                overwrite_output_dir=True,
                max_seq_length=arguments.cut,
                per_device_train_batch_size=arguments.batch,
                max_steps=arguments.steps,
                logging_steps=1,
                save_steps=0,
                amp="bf16" if arguments.bf16 else "off",
                compact_vocabulary=compact,
            )
        )
        lines = Path(folder, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step_seconds"] for line in lines]


def run_trainer(arguments: argparse.Namespace, tuned: bool = False) -> list[float]:
    from torch.utils.data import Dataset
    from transformers import (
        BertForSequenceClassification,
        BertTokenizerFast,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    tokenizer = BertTokenizerFast.from_pretrained(arguments.model)
    text_a, text_b, labels = rows(10**9)
    padding = False if tuned else "max_length"
    encoded = tokenizer(text_a, text_b, truncation=True, max_length=arguments.cut, padding=padding)

    class Rows(Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return len(labels)

        def __getitem__(self, i: int) -> dict[str, object]:
            return {**{name: values[i] for name, values in encoded.items()}, "labels": labels[i]}

    switches = {"optim": "adamw_torch_fused", "train_sampling_strategy": "group_by_length"} if tuned else {}
    clock = make_clock()
    with tempfile.TemporaryDirectory() as folder:
        settings = common_settings(arguments, folder) | switches
        Trainer(
            model=BertForSequenceClassification.from_pretrained(arguments.model),
            args=TrainingArguments(**settings),
            train_dataset=Rows(),
            data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if tuned else None),
            callbacks=[clock],
        ).train()
    return clock.seconds


def run_cross(arguments: argparse.Namespace) -> list[float]:
    from datasets import Dataset
    from sentence_transformers.cross_encoder import (
        CrossEncoder,
        CrossEncoderTrainer,
        CrossEncoderTrainingArguments,
    )
    from sentence_transformers.cross_encoder.losses import CrossEntropyLoss

    text_a, text_b, labels = rows(10**9)
    model = CrossEncoder(str(arguments.model), num_labels=3, max_length=arguments.cut, device="cpu")
    clock = make_clock()
    with tempfile.TemporaryDirectory() as folder:
        CrossEncoderTrainer(
            model=model,
            args=CrossEncoderTrainingArguments(**common_settings(arguments, folder)),
            train_dataset=Dataset.from_dict({"text_a": text_a, "text_b": text_b, "label": labels}),
            loss=CrossEntropyLoss(model),
            callbacks=[clock],
        ).train()
    return clock.seconds


def common_settings(arguments: argparse.Namespace, folder: str) -> dict[str, object]:
    return {
        "output_dir": folder,
        "max_steps": arguments.steps,
        "per_device_train_batch_size": arguments.batch,
        "learning_rate": 2e-5,
        "weight_decay": 0.01,
        "bf16": arguments.bf16,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 10**9,
        "disable_tqdm": True,
    }


def make_clock():  # type: ignore[no-untyped-def]
    """A callback of Trainer that notes the seconds of each step."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *given: object, **named: object) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *given: object, **named: object) -> None:
            self.seconds.append(time.perf_counter() - self.began)

    return Clock()


def peak_gb() -> float:
    """The process's peak memory, in 10⁹ bytes (Linux)."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 / 1e9 if found else 0.0


PROGRAMS: dict[str, Callable[[argparse.Namespace], list[float]]] = {
    "trainer": run_trainer,
    "tuned": lambda arguments: run_trainer(arguments, tuned=True),
    "cross": run_cross,
    "bertpair": run_bertpair,
    "compact": lambda arguments: run_bertpair(arguments, compact=True),
}

if __name__ == "__main__":
    main()
