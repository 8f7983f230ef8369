"""One small real training in a forked child, watched event by event: system calls, micro-batches, batches.

The parent has imported everything and started no thread, so that a child is at work within milliseconds; it
must never run a backward pass itself (autograd's threads do not survive a fork).
"""

import contextlib
import json
import mmap
import os
import random
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bertpair.checkpoints.checkpoint
import bertpair.evaluation.scorer
import bertpair.training.train
from bertpair import Config
from bertpair.checkpoints.checkpoint import list_checkpoints
from bertpair.checkpoints.run_folder import RunFolder
from bertpair.console import install_signal_handlers
from bertpair.training.optim import AdamW
from bertpair.training.step import Objective, Stepper

CALLS = (
    "mkdir", "chmod", "fchmod", "open", "write", "fsync", "ftruncate", "close", "rename", "replace", "link",
    "unlink", "rmdir",
)  # fmt: skip
TIMES = {"step_seconds", "pairs_per_s", "tokens_per_s", "memory", "eval_seconds"}
Settings = dict[str, Any]
Act = Callable[[str, int, str, Callable[..., Any], Any, Any], Any]


def let_it(
    place: str,
    number: int,
    name: str,
    real: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """The act that does nothing but the thing itself."""
    return real(*args, **kwargs)


class Board:
    """A line of text that outlives the child that wrote it."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 128)

    def write(self, text: str) -> None:
        self._memory[:128] = text.encode().ljust(128, b"\0")

    def read(self) -> str:
        return self._memory[:128].rstrip(b"\0").decode()


class Watch:
    """Knows the place a training is at and numbers the events there; `act` does each, or something else."""

    def __init__(self, act: Act, board: Board) -> None:
        self.act = act
        self.board = board
        self.places = ["preparation"]
        self.counts: Counter[str] = Counter()

    @contextlib.contextmanager
    def at(self, place: str) -> Iterator[None]:
        self.places.append(place)
        try:
            yield
        finally:
            self.places.pop()

    def event(self, name: str, real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        place = self.places[-1]
        self.counts[place] += 1
        self.board.write(f"{place}: {self.counts[place]} {name}")
        return self.act(place, self.counts[place], name, real, args, kwargs)


def watch_events(watch: Watch) -> None:
    """From now on every system call that changes the disk, and every piece of computing, is an event."""
    targets: list[tuple[Any, str]] = [(os, name) for name in CALLS]
    targets += [(Objective, "loss_sum"), (AdamW, "step"), (bertpair.evaluation.scorer, "pad_batch")]
    for owner, name in targets:
        real = getattr(owner, name)
        label = name if owner is os else {"loss_sum": "micro-batch", "step": "update"}.get(name, "batch")
        setattr(owner, name, _as_event(watch, label, real))


def watch_places(watch: Watch) -> None:
    """From now on the place is known: a step, an evaluation, a save, the final folder, its move."""
    _as_place(watch, Stepper, "step", lambda self, number, *rest: f"step {number}")
    _as_place(watch, bertpair.training.train, "evaluate_split", lambda *rest: "evaluation")
    _as_place(watch, RunFolder, "begin", lambda *rest: "begin")
    _as_place(watch, RunFolder, "save_checkpoint", lambda self, step, *rest: f"save {step}")
    _as_place(watch, RunFolder, "write_final", lambda *rest: "final")
    _as_place(watch, bertpair.checkpoints.checkpoint, "publish_final", lambda *rest: "move")


def _as_event(watch: Watch, label: str, real: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: watch.event(label, real, *args, **kwargs)


def _as_place(watch: Watch, owner: Any, name: str, place: Callable[..., str]) -> None:
    real = getattr(owner, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        with watch.at(place(*args)):
            result = real(*args, **kwargs)
            return watch.event("return", lambda: result)

    setattr(owner, name, watched)


def in_child(work: Callable[[], int], log: Path) -> int:
    """Fork; the child does `work` and exits with its result. Returns the child's number at once."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(child: int) -> int:
    """The child's exit code, negative where a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def start(settings: Settings, act: Act, board: Board, log: Path) -> int:
    """Start (or resume) a training in a child that does `act` at each event; returns the child's number."""

    def work() -> int:
        watch = Watch(act, board)
        watch_events(watch)
        watch_places(watch)
        return 1 if bertpair.training.train.train(Config(**settings)).save_failed else 0

    return in_child(work, log)


def kill_here() -> None:
    """The end, as the kernel gives it: no handler, no finally, no flush."""
    os.kill(os.getpid(), signal.SIGKILL)


def stop_twice() -> None:
    """The user's way: a signal that asks, and a second one that does not."""
    install_signal_handlers()
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)


def make_material(folder: Path, *, amp: str) -> Settings:
    """A task of three labels for a BERT of one layer, dropout on, accumulation 2, frequent saves."""
    rng = random.Random(5)
    words = ["cat", "sat", "mat", "good", "bad", "food", "数", "据", "库"]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    config = {
        "model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32, "max_position_embeddings": 32, "vocab_size": len(vocabulary),
        "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
    }  # fmt: skip
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text(json.dumps(config))
    (folder / "model" / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    for name, count in (("train", 96), ("dev", 48)):
        rows = ["index\tsentence1\tsentence2\tlabel"]
        for index in range(count):
            a, b, c = rng.sample(words, 3)
            label = rng.choice(["right", "wrong", "partly"])
            answer = {"right": f"{a} {b}", "wrong": c, "partly": a}[label]
            rows.append(f"{index}\t{a} {b}{' food' * rng.randrange(6)}\t{answer}\t{label}")
        (folder / f"{name}.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return {
        "data_dir": str(folder), "model_name_or_path": str(folder / "model"), "from_scratch": True,
        "resume": "auto", "max_seq_length": 24, "learning_rate": 5e-3, "num_train_epochs": 4.0,
        "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "per_device_eval_batch_size": 4,
        "logging_steps": 3, "save_steps": 2, "save_total_limit": 2, "eval_strategy": "steps", "eval_steps": 3,
        "load_best_model_at_end": True, "amp": amp, "device": "cpu", "num_threads": 1,
    }  # fmt: skip


def outcome(output_dir: Path) -> dict[str, object]:
    """What must be the same to the bit, by name; metrics.jsonl without its time, rate and memory fields."""
    last = list_checkpoints(output_dir)[-1][1]
    found: dict[str, object] = {
        "final weights": (output_dir / "model.safetensors").read_bytes(),
        "predictions": (output_dir / "predictions.tsv").read_bytes(),
        "last checkpoint": last.name,
        "last weights": (last / "model.safetensors").read_bytes(),
        "optimizer state": (last / "optimizer.safetensors").read_bytes(),
    }
    records = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    found["metrics.jsonl"] = [{k: v for k, v in record.items() if k not in TIMES} for record in records]
    return found


def temporary(output_dir: Path) -> list[str]:
    """What is left half-done in a folder, by name."""
    return sorted(path.name for path in output_dir.iterdir() if ".tmp-" in path.name or ".old-" in path.name)
