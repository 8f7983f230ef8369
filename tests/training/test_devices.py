"""What a device's waits, its memory and its precision do to a training; a CPU plays the device."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_tiny_bert

from bertpair import Config, ConfigError, TrainingError, train
from bertpair.data.batching import Batch
from bertpair.evaluation.scorer import Scorer
from bertpair.model.bert import BertClassifier, BertConfig
from bertpair.runtime import Precision, restore_random_state
from bertpair.training import loop
from bertpair.training.optim import AdamW, parameter_groups
from bertpair.training.step import Meter, Objective, Stepper

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_process")]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def material(tmp_path: Path) -> dict[str, object]:
    for name in ("train", "dev"):
        rows = [f"{i}\tthe cat {'sat' * (i % 3)}\t{name} food\t{'yes' if i % 2 else 'no'}" for i in range(24)]
        text = "\n".join(["index\tsentence1\tsentence2\tlabel", *rows]) + "\n"
        (tmp_path / f"{name}.tsv").write_text(text, encoding="utf-8")
    return {
        "data_dir": str(tmp_path),
        "model_name_or_path": str(write_tiny_bert(tmp_path / "bert")),
        "from_scratch": True,
        "output_dir": "out",
        "max_seq_length": 16,
        "per_device_train_batch_size": 4,
        "max_steps": 12,
        "num_threads": 1,
    }


def logged() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]


class QueueingDevice:
    """A device that takes steps at once, does each in 0.25 s, and is waited for by whoever reads it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.queued = 1000.0, 0.0
        monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: self.now))
        step, verdicts, logits = Stepper.step, Meter.verdicts, Scorer.logits

        def queue(*given: Any, **settings: Any) -> None:
            self.queued += 0.25
            step(*given, **settings)

        monkeypatch.setattr(Stepper, "step", queue)
        monkeypatch.setattr(Meter, "verdicts", lambda meter: self.wait() or verdicts(meter))
        monkeypatch.setattr(Scorer, "logits", lambda *given: self.wait(4.0) or logits(*given))

    def wait(self, more: float = 0.0) -> None:
        self.now += self.queued + more
        self.queued = 0.0


@pytest.mark.parametrize("logging_steps", [1, 4, 5])
def test_waiting_for_the_device_is_the_steps_time_and_not_the_evaluations(
    material: dict[str, object], monkeypatch: pytest.MonkeyPatch, logging_steps: int
) -> None:
    QueueingDevice(monkeypatch)
    often = {"eval_strategy": "steps", "eval_steps": 3, "save_steps": 2, "logging_steps": logging_steps}
    train(Config(**{**material, **often}))  # type: ignore[arg-type]
    records = logged()
    assert {record["step_seconds"] for record in records if "step_seconds" in record} == {0.25}
    assert {record["pairs_per_s"] for record in records if "pairs_per_s" in record} == {16.0}
    assert [record["eval_seconds"] for record in records if "eval_seconds" in record] == [4.0] * 4


def test_skipped_steps_are_logged_once_whoever_reads_them_first(
    material: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Stepper.step

    def poisoned(self: Stepper, number: int, *given: Any, denominator: float, **settings: Any) -> None:
        spoilt = float("nan") if number in (2, 7) else denominator
        original(self, number, *given, denominator=spoilt, **settings)

    monkeypatch.setattr(Stepper, "step", poisoned)
    often = {"eval_strategy": "steps", "eval_steps": 3, "save_steps": 2, "logging_steps": 5}
    train(Config(**{**material, **often}))  # type: ignore[arg-type]
    found = {record["step"]: record.get("skipped_steps") for record in logged() if "loss" in record}
    assert found == {5: [2], 10: [7], 12: None}


NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of it")


def out_of_memory(number: int, error: Exception = NO_MEMORY) -> Callable[..., None]:
    original = Stepper.step

    def step(self: Stepper, done: int, *given: Any, **settings: Any) -> None:
        if done == number:
            raise error
        original(self, done, *given, **settings)

    return step


@pytest.mark.parametrize("save_steps", [0, 4])
def test_training_out_of_memory_is_one_line_with_what_to_do(
    material: dict[str, object], monkeypatch: pytest.MonkeyPatch, save_steps: int
) -> None:
    settings = {**material, "save_steps": save_steps, "eval_strategy": "no"}
    with monkeypatch.context() as patched, pytest.raises(TrainingError) as caught:
        patched.setattr(Stepper, "step", out_of_memory(7, NO_MEMORY if save_steps else MemoryError()))
        train(Config(**settings))  # type: ignore[arg-type]
    said = str(caught.value)
    assert "\n" not in said and "after step 6" in said
    assert "per_device_train_batch_size (4)" in said and "gradient_accumulation_steps (1)" in said
    if not save_steps:
        assert "no checkpoint has been written" in said
        return
    assert "checkpoint-4 stands" in said
    with monkeypatch.context() as patched, pytest.raises(ConfigError, match="no room for the model"):
        patched.setattr(
            "bertpair.training.train.load_state_tensors", lambda *_: (_ for _ in ()).throw(NO_MEMORY)
        )
        train(Config(resume="auto", output_dir=str(settings["output_dir"])))
    advised = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "resume": "auto"}
    assert "with these two, --resume goes on from it" in said
    resumed = train(Config(**{**settings, **advised}), explicit=advised.keys())  # type: ignore[arg-type]
    assert resumed.global_step > 7
    with pytest.raises(ConfigError, match=r"the run has 4 rows a step \(.*\), found 2 rows a step"):
        train(Config(**{**settings, **advised, "gradient_accumulation_steps": 1}))  # type: ignore[arg-type]


OUT_OF_MEMORY = """
import sys
sys.path[:0] = {folders!r}
from test_devices import out_of_memory
from bertpair.console import run_script
from bertpair.training.step import Stepper
from bertpair.__main__ import train
Stepper.step = out_of_memory(1)
sys.exit(run_script(lambda: train(sys.argv[1:])))
"""


def test_training_out_of_memory_ends_the_command_with_2(material: dict[str, object]) -> None:
    flags = [word for name, value in material.items() for word in (f"--{name}", str(value))]
    program = OUT_OF_MEMORY.format(folders=[str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", program, *flags], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and done.stdout == "", done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: out of memory after step 0 on cpu")


FULL_DEVICE = """
import sys
sys.path.insert(0, {root!r})
import torch
from bertpair.console import run_script
from bertpair.model.bert import BertClassifier
from bertpair.__main__ import {script}
def full(*given):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\\nMore of it")
BertClassifier.to = full
sys.exit(run_script(lambda: {script}(sys.argv[1:])))
"""


def test_a_device_too_small_for_the_model_ends_each_command_with_2(
    material: dict[str, object], tmp_path: Path
) -> None:
    train(Config(**{**material, "output_dir": str(tmp_path / "done")}))  # type: ignore[arg-type]
    training = [word for name, value in material.items() for word in (f"--{name}", str(value))]
    model = ["--model_dir", str(tmp_path / "done")]
    commands = (("train", training), ("evaluate", model), ("serve", [*model, "--port", "0"]))
    for script, flags in commands:
        program = FULL_DEVICE.format(root=str(ROOT), script=script)
        done = subprocess.run(
            [sys.executable, "-c", program, *flags], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 2 and done.stdout == "", done.stderr
        said = "error: out of memory: cpu has no room for the model (CUDA out of memory. Tried to allocate"
        assert done.stderr.splitlines()[-1].startswith(said) and "Traceback" not in done.stderr
    assert not Path("out", "config.json").exists()


@pytest.mark.parametrize("name", ["off", "bf16"])
def test_one_context_for_all_micro_batches_changes_no_bit(name: str) -> None:
    """Beside a context for each, with the loss and the backward outside."""
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_labels=3
    )
    device, precision = torch.device("cpu"), Precision(name, "test")  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(1)
    ids = [torch.randint(1, 50, (4, length), generator=draw) for length in (9, 16, 12)]
    targets = torch.tensor([0, 1, 2, 1])
    batches = [Batch(np.arange(4), each, torch.zeros_like(each), None, targets, each.numel()) for each in ids]

    def make_model() -> BertClassifier:
        torch.manual_seed(2)
        return BertClassifier(config).train()

    model, plain = make_model(), make_model()
    stepper = Stepper(
        model,
        AdamW(parameter_groups(model, 0.0), lr=1e-3),
        Objective(False),
        device=device,
        precision=precision,
        max_grad_norm=1.0,
    )
    torch.manual_seed(4)
    loss = stepper._backward(batches, 12.0)
    torch.manual_seed(4)
    expected = torch.zeros(())
    for batch in batches:
        with precision.autocast(device):
            logits = plain(batch.input_ids, batch.token_type_ids, batch.attention_mask)
        part = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum") / 12.0
        part.backward()
        expected += part.detach()
    assert torch.equal(loss, expected)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None and torch.equal(one.grad, other.grad)


def test_weights_are_converted_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of micro-batches: counted by the casts that are made of the weight's shape."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Casts(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._to_copy.default and args[0].shape == (77, 32):
                self.count += args[0].dtype == torch.float32
            return func(*args, **(kwargs or {}))

    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=77
    )
    torch.manual_seed(2)
    model = BertClassifier(config)
    stepper = Stepper(
        model,
        AdamW(parameter_groups(model, 0.0), lr=1e-3),
        Objective(False),
        device=torch.device("cpu"),
        precision=Precision("bf16", "test"),
        max_grad_norm=1.0,
    )
    ids = torch.randint(1, 50, (4, 8))
    batch = Batch(np.arange(4), ids, torch.zeros_like(ids), None, torch.tensor([0, 1, 0, 1]), 32)
    with Casts() as casts:
        stepper.step(1, batch.rows, [batch] * 3, denominator=12, learning_rate=1e-3)
    assert casts.count == config.num_hidden_layers


def test_a_resume_on_another_kind_of_device_says_what_starts_anew(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        restore_random_state({"cpu": torch.get_rng_state()}, torch.device("cuda"))
    assert "no random state of a cuda device" in caplog.text
