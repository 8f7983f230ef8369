"""Several processes of one training: started by torchrun, or without it by what torchrun would tell them.

As a script this file is train.py. It writes what each step has to the file that `STEPS` names, with the rank
at its end, and what `HAPPENS` says comes to pass: `1:17:SIGKILL` sends process 1 that signal after
step 17, unless torchrun has started it anew.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import write_repeats, write_tiny_bert

from bertpair.checkpoints.manifest import verify_folder

ROOT = Path(__file__).parents[2]
SAVES = {"max_steps": 24, "save_steps": 7, "eval_strategy": "steps", "eval_steps": 9, "resume": "auto"}
WITHIN = 60  # seconds that anything here may take


class Worker:
    """A process; what it says goes to a file and is read from there."""

    def __init__(
        self, command: Sequence[str], said: Path, variables: Mapping[str, str], folder: str = "."
    ) -> None:
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **variables}
        self.path, self.is_torchrun = said, "torch.distributed.run" in command
        with open(said, "wb") as file:
            self.process = subprocess.Popen(
                command, env=environment, cwd=folder, stdout=file, stderr=file, stdin=subprocess.DEVNULL
            )

    @property
    def said(self) -> str:
        return self.path.read_text(errors="replace")

    def wait(self, within: float = WITHIN) -> int:
        """Its exit code; AssertionError with what it said if it does not end."""
        try:
            return self.process.wait(within)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running: {self.said}") from None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *args: object) -> None:
        if self.process.poll() is None and self.is_torchrun:
            self.process.terminate()  # it ends its processes; killed, it would leave them
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(WITHIN)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def write_task(folder: Path) -> dict[str, object]:
    """Settings for a task that a tiny model learns: how much of the first text does the second one repeat?

    Of the 91 rows an epoch's last batch has 7 where the others have 12.
    """
    rng = np.random.default_rng(3)
    for name, count in (("train.tsv", 91), ("dev.tsv", 60)):
        write_repeats(folder / name, count, rng, shares=[0.5, 0.3, 0.2])
    return {
        "data_dir": str(folder),
        "model_name_or_path": str(write_tiny_bert(folder / "tiny-bert")),
        "from_scratch": True,
        "output_dir": "out",
        "max_seq_length": 24,
        "learning_rate": 1e-2,
        "max_steps": 40,
        "per_device_train_batch_size": 6,
        "logging_steps": 10,
        "save_steps": 0,
        "eval_strategy": "no",
        "amp": "off",
        "num_threads": 1,
        "ddp_timeout": 30,
    }


def records(path: Path) -> list[dict[str, Any]]:
    """What a file of JSON lines holds."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same_end(one: Path, other: Path) -> None:
    """Weights, answers, and the optimizer with all random states, are the same to the bit."""
    for name in ("model.safetensors", "predictions.tsv", "checkpoint-24/optimizer.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    verify_folder(other)


def free_port() -> int:
    """A port of the loopback that is free now."""
    with socket.socket() as line:
        line.bind(("127.0.0.1", 0))
        return int(line.getsockname()[1])


def flags(settings: Mapping[str, object]) -> list[str]:
    """Settings as a command line says them."""
    return [str(word) for name, value in settings.items() for word in (f"--{name}", value)]


def start(
    stack: ExitStack,
    size: int,
    command: Sequence[str],
    folders: Sequence[str] = (),
    **variables: str,
) -> list[Worker]:
    """`size` processes of one command, which know of each other as torchrun would have told them.

    Each may work in a folder of its own. All are ended with the stack.
    """
    port, workers = free_port(), []
    for rank in range(size):
        told: dict[str, object] = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": size,
            "LOCAL_WORLD_SIZE": size,
        }
        told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        known = {**{name: str(value) for name, value in told.items()}, **variables}
        said = Path(f"said-{port}-{rank}.txt")
        worker = Worker([sys.executable, *command], said, known, folders[rank] if folders else ".")
        workers.append(stack.enter_context(worker))
    return workers


def start_training(
    stack: ExitStack,
    size: int,
    settings: Mapping[str, object],
    folders: Sequence[str] = (),
    **variables: str,
) -> list[Worker]:
    """`start` of a training; `HAPPENS` and `STEPS` as above."""
    return start(stack, size, [__file__, *flags(settings)], folders, **variables)


def finish(workers: Sequence[Worker]) -> list[int]:
    """The exit codes of all, in the order of ranks."""
    return [worker.wait() for worker in workers]


def run(size: int, *command: str, **variables: str) -> list[str]:
    """Run it to its end in `size` processes and return what each said; AssertionError unless all end well."""
    with ExitStack() as stack:
        workers = start(stack, size, command, **variables)
        codes = finish(workers)
        said = [worker.said for worker in workers]
    assert codes == [0] * size, said
    return said


def train(size: int, settings: Mapping[str, object], **variables: str) -> list[str]:
    """`run` of a training."""
    return run(size, __file__, *flags(settings), **variables)


def line(options: Sequence[str], settings: Mapping[str, object]) -> list[str]:
    """torchrun's own command line, with a training."""
    return [sys.executable, "-m", "torch.distributed.run", *options, __file__, *flags(settings)]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def main() -> None:
    """train.py, watched."""
    from bertpair.__main__ import main
    from bertpair.data.batching import Batch, Rows
    from bertpair.training.step import Stepper

    rank, steps = os.environ.get("RANK", "0"), os.environ.get("STEPS")
    whom, when, what = os.environ.get("HAPPENS", "-:0:SIGTERM").split(":")
    is_first_try = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    original = Stepper.step

    def step(self: Stepper, number: int, rows: Rows, batches: list[Batch], **given: Any) -> None:
        if steps:
            own, random = [batch.rows.tolist() for batch in batches], torch.get_rng_state().numpy().tobytes()
            told = {"step": number, "own": own, "random": sha256(random).hexdigest(), "pid": os.getpid()}
            with open(f"{steps}{rank}", "a") as file:
                file.write(json.dumps(told) + "\n")
        original(self, number, rows, batches, **given)
        if (rank, number) == (whom, int(when)) and is_first_try:
            os.kill(os.getpid(), signal.Signals[what])

    Stepper.step = step  # type: ignore[method-assign,assignment]
    sys.argv[0] = str(ROOT / "train.py")
    main("train")


if __name__ == "__main__":
    main()
