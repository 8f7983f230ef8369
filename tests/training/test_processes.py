"""Several processes on one machine do what one does: batches, sums, figures, stops, resumes and refusals."""

import json
import random
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import messages
import numpy as np
import pytest
import torch
import torchrun
from conftest import write_tiny_bert
from safetensors.torch import load_file

from bertpair import Config, ConfigError, PairClassifier, train
from bertpair.checkpoints.manifest import verify_folder
from bertpair.data.batching import Batch
from bertpair.training.step import Stepper

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_process")]

Settings = Mapping[str, object]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    return torchrun.write_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def still(settings: Settings) -> dict[str, object]:
    """Without dropout."""
    folder = Path(str(settings["data_dir"])) / "still"
    write_tiny_bert(folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return {**settings, "model_name_or_path": str(folder)}


def alone(settings: Settings, **changes: object) -> Path:
    """Train in this process."""
    return Path(train(Config(**{**settings, **changes})).output_dir)  # type: ignore[arg-type]


def rows_of(parts: Iterable[Mapping[str, Any]]) -> list[int]:
    """The rows of one step of all processes."""
    return sorted(row for part in parts for batch in part["own"] for row in batch)


def watch_rows(work: Callable[[], object]) -> list[list[int]]:
    """The rows of each step that this process does in `work`."""
    steps, original = list[list[int]](), Stepper.step

    def step(self: Stepper, number: int, rows: Any, batches: list[Batch], **given: Any) -> None:
        steps.append(rows_of([{"own": [batch.rows.tolist() for batch in batches]}]))
        original(self, number, rows, batches, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "step", step)
        work()
    return steps


def dev_logits(folder: Path, settings: Settings) -> np.ndarray:
    lines = Path(str(settings["data_dir"]), "dev.tsv").read_text(encoding="utf-8").splitlines()[1:]
    rows = [line.split("\t") for line in lines]
    return PairClassifier.from_pretrained(folder).logits([(row[1], row[2]) for row in rows])


def test_what_the_processes_tell_each_other() -> None:
    """Against sums and logits that this process computes alone."""
    torch.set_num_threads(1)
    torchrun.run(3, messages.__file__, ".")
    ranks = range(3)
    known = [torch.load(f"{rank}.pt", weights_only=False) for rank in ranks]
    given = list(zip(*map(messages.own_bytes, ranks), strict=True))
    large = list(zip(*map(messages.own_large, ranks), strict=True))
    for rank, each in enumerate(known):
        assert each["gathered"] == [list(parts) for parts in given]
        assert each["shared"] == {"мир": [1, None, 0.1, "\n"]}
        for name, own in (("numbers", messages.own_numbers), ("lone", messages.own_lone)):
            assert_sums(each[name], known[0][name], list(map(own, ranks)))
        assert each["large"] == [messages.digest(sum(parts[1:], parts[0])) for parts in large]
        for found, first in zip(each["weights"], messages.own_weights(0), strict=True):
            assert torch.equal(found, first) and found.dtype == first.dtype
        assert each["made"] == f"made by {rank}"
        assert_faults(rank, each["faults"])
        for (count, budget), logits in each["logits"].items():
            own = messages.scorer(budget).logits(messages.rows(count).tokens)
            assert logits.shape == (count, 3) and np.array_equal(logits, own), (count, budget)
        assert each["figures"] == messages.figures(messages.scorer(16))
        assert each["stopped"] == signal.SIGTERM


def assert_faults(rank: int, found: list[str]) -> None:
    """One process says what is wrong; the others say which one that is."""
    elsewhere = [f"ElsewhereError: process {other} of this run cannot go on" for other in (0, 0, 0, 0, 1)]
    if rank == 0:
        said = "ConfigError: dev data: process{} did not read what process 0 read; "
        for fault, whose in zip(found, (" 1", "es 1, 2", "es 1, 2"), strict=False):
            assert fault.startswith(said.format(whose))
        assert found[3:] == ["DataError: 0 cannot read this", elsewhere[4]]
    else:
        own = "DataError: 1 cannot read this" if rank == 1 else elsewhere[4]
        assert found == [*elsewhere[:4], own]


def assert_sums(
    found: list[torch.Tensor], of_first: list[torch.Tensor], own: list[list[torch.Tensor]]
) -> None:
    """Right to rounding, with shape and type, and the same bits as the first process has."""
    for ours, theirs, *parts in zip(found, of_first, *own, strict=True):
        assert ours.shape == parts[0].shape and ours.dtype == parts[0].dtype
        assert ours.contiguous().numpy().tobytes() == theirs.contiguous().numpy().tobytes()
        exact = torch.stack(parts).double().sum(0)
        torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def references(
    still: Settings, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, tuple[Path, Path, list[list[int]]]]:
    """By the number of training rows: one process, in batches of 12 and of 6, and the rows of its steps."""
    folder, found = tmp_path_factory.mktemp("references"), {}
    for rows in (85, 91):
        one, two = (
            {**still, "max_train_samples": rows, "output_dir": str(folder / f"{rows}-{n}")} for n in "12"
        )
        steps = watch_rows(partial(alone, one, per_device_train_batch_size=12))
        found[rows] = Path(str(one["output_dir"])), alone(two, gradient_accumulation_steps=2), steps
    return found


@pytest.mark.parametrize(
    ("size", "batch", "accumulation", "rows", "shares"),
    [(2, 6, 1, 85, [[1], []]), (3, 2, 2, 91, [[2, 1], [2], [2]])],
)
def test_several_processes_train_like_one(
    still: Settings,
    references: Mapping[int, tuple[Path, Path, list[list[int]]]],
    size: int,
    batch: int,
    accumulation: int,
    rows: int,
    shares: list[list[int]],
) -> None:
    """Every step has the rows of one process's step, and the model ends the same to rounding. `shares` is
    what the processes have of an epoch's last batch, which they cannot share evenly."""
    changes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    torchrun.train(size, {**still, **changes, "max_train_samples": rows}, STEPS="steps-")
    one, two, expected = references[rows]
    told = [torchrun.records(Path(f"steps-{rank}")) for rank in range(size)]
    assert [rows_of(parts) for parts in zip(*told, strict=True)] == expected
    for step in range(40):
        sizes = [list(map(len, each[step]["own"])) for each in told]
        assert sizes == (shares if step % 8 == 7 else [[batch] * accumulation] * size)
    assert [len(each) for each in expected] == [*[12] * 7, rows % 12] * 5
    logits = [dev_logits(folder, still) for folder in (one, two, Path("out"))]
    by_accumulation, by_processes = (float(np.abs(logits[0] - each).max()) for each in logits[1:])
    print(f"{size} processes: {by_processes:.2e}, accumulation {by_accumulation:.2e}")
    assert 0 < by_processes <= 3 * by_accumulation


@pytest.fixture(scope="module")
def broken_off(settings: Settings) -> dict[str, object]:
    """A run with dropout, evaluations and saves, for those that are stopped."""
    return {**settings, **torchrun.SAVES}


@pytest.fixture(scope="module")
def whole(broken_off: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that run in two processes, never stopped; the rows of its steps are beside it."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torchrun.train(2, {**broken_off, "output_dir": "whole"}, STEPS="steps-")
    return folder / "whole"


def started(options: list[str], settings: Settings, **variables: str) -> torchrun.Worker:
    """torchrun, with two processes of a training."""
    here = ["--standalone", "--nproc_per_node", "2", *options]
    return torchrun.Worker(torchrun.line(here, settings), Path("said"), variables)


def test_a_killed_process_is_started_anew_and_the_run_ends_bitwise_the_same(
    broken_off: Settings, whole: Path
) -> None:
    happens = f"{random.randrange(2)}:{random.randrange(8, 24)}:SIGKILL"
    with started(["--max_restarts", "1"], broken_off, HAPPENS=happens) as run:
        assert run.wait(120) == 0, (happens, run.said)
    assert "another process of this run has ended" in run.said, (happens, run.said)
    torchrun.assert_same_end(whole, Path("out"))


def test_without_a_restart_the_others_of_a_killed_process_end(broken_off: Settings) -> None:
    with started([], broken_off, HAPPENS="1:9:SIGKILL", STEPS="steps-") as run:
        assert run.wait() != 0, run.said
    assert re.search("^error: another process of this run has ended, or does not answer", run.said, re.M)
    assert not any(torchrun.is_alive(torchrun.records(Path(f"steps-{rank}"))[0]["pid"]) for rank in range(2))
    assert not Path("out/model.safetensors").exists()
    verify_folder(Path("out/checkpoint-7"))


def test_a_process_that_does_not_answer_ends_the_others(broken_off: Settings) -> None:
    with ExitStack() as stack:
        silent = {**broken_off, "ddp_timeout": 5}
        workers = torchrun.start_training(stack, 2, silent, HAPPENS="0:4:SIGSTOP")
        assert workers[1].wait() == 2
        assert (
            "process 1: error: another process of this run has ended, or does not answer" in workers[1].said
        )


def test_sigterm_to_one_process_ends_all_at_one_step_and_the_run_can_go_on(
    broken_off: Settings, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In two processes it ends bitwise the same; in one, with batches twice as large, on the same rows."""
    with ExitStack() as stack:
        workers = torchrun.start_training(stack, 2, broken_off, HAPPENS="1:16:SIGTERM")
        assert torchrun.finish(workers) == [143, 143], [worker.said for worker in workers]
    saved = "stopped by SIGTERM: saved at step 16; continue with torchrun --nproc_per_node 2 "
    assert saved in workers[0].said and "stopped" not in workers[1].said
    assert sorted(path.name for path in Path("out").glob("checkpoint-*")) == [
        "checkpoint-14",
        "checkpoint-16",
        "checkpoint-7",
        "checkpoint-9",
    ]
    verify_folder(Path("out/checkpoint-16"))
    states = load_file("out/checkpoint-16/optimizer.safetensors")
    assert states["rng.cpu"].shape == states["rng.1.cpu"].shape
    assert not torch.equal(states["rng.cpu"], states["rng.1.cpu"])
    shutil.copytree("out", "one")
    torchrun.train(2, broken_off)
    torchrun.assert_same_end(whole, Path("out"))
    products = r"has 12 rows .* 6 × .* 1 × 2 processes\), found 6 rows .* 6 × .* 1 × 1 process\)"
    with pytest.raises(ConfigError, match=products):
        alone(broken_off, output_dir="one")
    rows = watch_rows(lambda: alone(broken_off, output_dir="one", per_device_train_batch_size=12))
    assert "processes was 2, is now 1; results then agree to rounding" in caplog.text
    steps = [torchrun.records(whole.with_name(f"steps-{rank}")) for rank in range(2)]
    assert all(ours["random"] != theirs["random"] for ours, theirs in zip(*steps, strict=True))
    assert rows == [rows_of(parts) for parts in zip(*(each[16:] for each in steps), strict=True)]


def test_other_data_in_one_process_are_refused_in_all(settings: Settings) -> None:
    for folder in ("one", "two"):
        shutil.copytree(str(settings["data_dir"]), f"{folder}/data")
    lines = Path("two/data/train.tsv").read_text().splitlines(keepends=True)
    Path("two/data/train.tsv").write_text("".join([*lines[:-2], *reversed(lines[-2:])]))
    relative = {**settings, "data_dir": "data", "output_dir": "../out"}
    with ExitStack() as stack:
        workers = torchrun.start_training(stack, 2, relative, folders=["one", "two"])
        assert torchrun.finish(workers) == [2, 2]
    assert "\nerror: training data: process 1 did not read what process 0 read" in workers[0].said
    assert not Path("out").exists() and [path.name for path in Path("one").iterdir()] == ["data"]


def test_another_network_in_one_process_is_refused_in_all(settings: Settings) -> None:
    for folder, layers in (("one", 2), ("two", 1)):
        Path(folder).mkdir()
        write_tiny_bert(Path(folder, "model"), num_hidden_layers=layers)
    own = {**settings, "model_name_or_path": "model", "output_dir": "../out"}
    with ExitStack() as stack:
        workers = torchrun.start_training(stack, 2, own, folders=["one", "two"])
        assert torchrun.finish(workers) == [2, 2]
    assert "\nerror: the model's shape: process 1 did not read what process 0 read" in workers[0].said
    assert not Path("out").exists()


@pytest.mark.parametrize("command", ["train.py --seeds 2", "evaluate.py", "serve.py"])
def test_what_one_process_does_is_refused_under_torchrun(
    settings: Settings, whole: Path, command: str
) -> None:
    given = {"model_dir": whole} if "train" not in command else settings
    given = {"model_dir": whole, "data_dir": settings["data_dir"]} if "evaluate" in command else given
    script, *words = command.split()
    line = [sys.executable, str(torchrun.ROOT / script), *words, *torchrun.flags(given)]
    with torchrun.Worker(line, Path("said"), {"RANK": "0", "WORLD_SIZE": "2"}) as worker:
        assert worker.wait() == 2, worker.said
    last = worker.said.splitlines()[-1]
    assert last.startswith("error: ") and "without torchrun" in last
    assert not Path("out").exists()


def test_all_that_a_run_can_have_ends_like_in_one_process(still: Settings) -> None:
    """The compact vocabulary, class weights, label smoothing, and the best weights."""
    best = {"eval_strategy": "steps", "eval_steps": 5, "load_best_model_at_end": True}
    best |= {
        "metric_for_best_model": "loss",
        "lr_scheduler_type": "constant",
        "learning_rate": 5e-3,
        "max_steps": 20,
    }
    best |= {"class_weights": "balanced", "label_smoothing": 0.1}
    given = {**still, **best, "compact_vocabulary": True, "max_steps": 20}
    torchrun.train(2, {**given, "output_dir": "two"})
    one, two = alone(given, output_dir="one", per_device_train_batch_size=12), Path("two")
    states = [json.loads((folder / "trainer_state.json").read_text()) for folder in (one, two)]
    assert states[0]["best_step"] == states[1]["best_step"] == states[0]["weights_step"]
    for state in states:  # the best weights are in all processes
        assert state["result"]["metrics"]["loss"] == pytest.approx(state["best_metric"], abs=1e-9)
    logits = [dev_logits(folder, still) for folder in (one, two)]
    np.testing.assert_allclose(*logits, rtol=1e-3, atol=1e-3)
    logs = [torchrun.records(folder / "metrics.jsonl") for folder in (one, two)]
    for ours, theirs in zip(*logs, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ("step", "lr", "eval_n"):
            assert ours.get(name) == theirs.get(name)
        for name in {"loss", "grad_norm", "eval_loss"} & ours.keys():
            assert theirs[name] == pytest.approx(ours[name], rel=1e-3)
