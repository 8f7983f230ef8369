"""Several seeds of one recipe: the table, what stays on the disk, going on, and what is refused."""

import json
import logging
import random
import shutil
import signal
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_tiny_bert
from matplotlib.figure import Figure

from bertpair import CheckpointError, Config, ConfigError, StoppedError, run_seeds, train
from bertpair.checkpoints.lock import RunLock
from bertpair.console import stop_flag
from bertpair.evaluation.metrics import finite_or_null
from bertpair.search.seeds import Summary
from bertpair.settings.command_line import parse_command_line
from bertpair.training.step import Stepper

RECIPE = Config(
    model_name_or_path="tiny",
    from_scratch=True,
    train_file=["train.tsv"],
    dev_file=["dev.tsv"],
    output_dir="out",
    device="cpu",
    amp="off",
    num_threads=1,
    max_seq_length=24,
    per_device_train_batch_size=8,
    max_steps=6,
    learning_rate=1e-2,
    save_steps=4,
    metric_for_best_model="loss",
)
RESULTS = {
    *("confusion_matrix.png", "curves.png", "eval_results.json", "eval_results.txt", "metrics.jsonl"),
    *("predictions.tsv", "errors.tsv", "figures.json", "report.html", "training_args.yaml"),
}
slow = pytest.mark.slow


def recipe(**changes: Any) -> Config:
    return RECIPE.model_copy(update=changes)


def blank(self: Figure, file: Any, **options: Any) -> None:
    file.write('<svg viewBox="0 0 9 9"/>' if options["format"] == "svg" else b"a picture")


@pytest.fixture(scope="module", autouse=True)
def blank_pictures() -> Iterator[None]:
    """Drawing takes most of the time of so short a run, and is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", blank)
        yield


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, blank_pictures: None) -> tuple[Path, Summary]:
    """The data, the model, the runs of three seeds in `out`, and what came out."""
    folder = tmp_path_factory.mktemp("three")
    random_words, lines = random.Random(3), ["index\tsentence1\tsentence2\tlabel"]
    for i in range(60):
        a, b = (" ".join(random_words.choices("the cat sat mat good bad food".split(), k=3)) for _ in "ab")
        lines.append(f"{i}\t{a}\t{b}\t{'yes' if 'good' in a else 'no'}")
    (folder / "train.tsv").write_text("\n".join(lines[:41]) + "\n")
    (folder / "dev.tsv").write_text("\n".join([lines[0], *lines[41:]]) + "\n")
    write_tiny_bert(folder / "tiny", num_hidden_layers=1)
    threads = torch.get_num_threads()
    with chdir(folder):
        summary = run_seeds(RECIPE, 3)
    torch.set_num_threads(threads)
    return folder, summary


@pytest.fixture
def summary(three: tuple[Path, Summary], fresh_process: None) -> Summary:
    """What came out; its folder is the current one, with all that was written."""
    shutil.copytree(three[0], Path.cwd(), dirs_exist_ok=True)
    return three[1]


def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(*args: object, **kwargs: object) -> None:
        raise AssertionError("a run was trained")

    monkeypatch.setattr(Stepper, "step", step)


def figures_of(summary: Summary) -> dict[str, Any]:
    return {name: figures.metrics for name, figures in summary.runs.items()}


def contents(folder: str) -> dict[str, tuple[int, bytes]]:
    paths = [path for path in Path(folder).rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


@slow
def test_mean_and_deviation_are_those_of_numpy(summary: Summary) -> None:
    assert list(summary.runs) == ["seed-42", "seed-43", "seed-44"]
    metrics = {"loss", "acc", "f1", "macro_f1", "mcc"}
    assert summary.means.keys() == metrics and summary.metric == "loss"
    for metric in metrics:
        values = [figures.metrics[metric] for figures in summary.runs.values()]
        np.testing.assert_allclose(
            summary.means[metric], (np.mean(values), np.std(values, ddof=1)), atol=1e-15
        )
    losses = {name: figures.metrics["loss"] for name, figures in summary.runs.items()}
    assert len(set(losses.values())) == 3  # seeds do differ
    mean, deviation = summary.means["loss"]
    best = min(losses, key=losses.__getitem__)
    assert summary.summary() == {
        "output_dir": "out",
        "metric": "loss",
        "mean": mean,
        "std": deviation,
        "best_model": f"out/{best}",
    }
    lines = summary.table.splitlines()
    assert lines[0].split()[0] == "run" and [line.split()[0] for line in lines[1:4]] == list(losses)
    assert lines[4].startswith("mean ± std") and f"{mean:.4f} ± {deviation:.4f}" in lines[4]


@slow
def test_the_file_of_results_has_all_digits(summary: Summary) -> None:
    head, *rows = [line.split("\t") for line in Path("out/seeds_results.tsv").read_text().splitlines()]
    assert head == ["run", *summary.means, "seconds", "host"]
    for row, (name, figures) in zip(rows, summary.runs.items(), strict=True):
        cells = dict(zip(head, row, strict=True))
        assert cells["run"] == name and cells["host"] == figures.host
        assert {metric: float(cells[metric]) for metric in summary.means} == {
            metric: figures.metrics[metric] for metric in summary.means
        }


@slow
def test_a_seed_is_what_a_single_run_with_it_is(summary: Summary) -> None:
    for seed in (42, 43, 44):
        result = train(recipe(seed=seed, output_dir="single", overwrite_output_dir=True))
        assert finite_or_null(result.metrics) == summary.runs[f"seed-{seed}"].metrics
        for name in ("predictions.tsv", "eval_results.json"):
            assert Path("single", name).read_bytes() == Path(f"out/seed-{seed}", name).read_bytes()
        if summary.best_model == f"out/seed-{seed}":
            weights = [
                Path(folder, "model.safetensors").read_bytes() for folder in ("single", summary.best_model)
            ]
            assert weights[0] == weights[1]


@slow
def test_only_the_best_keeps_its_weights(summary: Summary) -> None:
    for name in summary.runs:
        found = {path.name for path in Path("out", name).iterdir()}
        if summary.best_model == f"out/{name}":
            assert found > RESULTS | {"config.json", "model.safetensors", "checkpoint-4", "checkpoint-6"}
        else:
            assert found == RESULTS
    assert {path.name for path in Path("out").iterdir()} == {
        *("seed-42", "seed-43", "seed-44", "runs.json", "seeds_results.tsv", ".lock")
    }


@slow
def test_the_same_again_trains_nothing(summary: Summary, monkeypatch: pytest.MonkeyPatch) -> None:
    no_training(monkeypatch)
    before = contents("out")
    assert run_seeds(RECIPE, 3) == summary
    after = contents("out")
    assert before.pop("out/seeds_results.tsv")[1] == after.pop("out/seeds_results.tsv")[1]
    assert after == before
    assert run_seeds(recipe(logging_steps=7, save_steps=0), 3) == summary  # what results do not depend on
    two = run_seeds(RECIPE, 2)
    assert list(two.runs) == ["seed-42", "seed-43"]


@slow
def test_a_figure_that_is_not_finite_is_a_dash_and_has_no_mean(summary: Summary) -> None:
    stored = json.loads(Path("out/runs.json").read_text())
    for name, metric in (("seed-42", "mcc"), ("seed-43", "f1"), ("seed-42", "loss")):
        stored["runs"][name]["metrics"][metric] = None
    Path("out/runs.json").write_text(json.dumps(stored))
    found = run_seeds(RECIPE, 3)
    assert found.means.keys() == summary.means.keys() - {"mcc", "f1", "loss"}
    lines = [line.split("  ") for line in found.table.splitlines()]
    assert sum("-" in map(str.strip, line) for line in lines) == 3  # two rows and the means
    assert found.summary()["mean"] is found.summary()["std"] is None
    head, first, *_ = [line.split("\t") for line in Path("out/seeds_results.tsv").read_text().splitlines()]
    assert dict(zip(head, first, strict=True))["mcc"] == ""


@slow
def test_more_seeds_train_only_those(summary: Summary) -> None:
    more = run_seeds(RECIPE, 4)
    assert list(more.runs) == ["seed-42", "seed-43", "seed-44", "seed-45"]
    assert {name: more.runs[name] for name in summary.runs} == summary.runs
    with_weights = [path.parent.name for path in Path("out").glob("seed-*/model.safetensors")]
    assert [f"out/{name}" for name in with_weights] == [more.best_model]


@slow
def test_another_recipe_is_refused(summary: Summary, monkeypatch: pytest.MonkeyPatch) -> None:
    no_training(monkeypatch)
    before = contents("out")
    for changes in ({}, {"overwrite_output_dir": False}):
        with pytest.raises(ConfigError) as caught:
            run_seeds(recipe(learning_rate=0.02, seed=43, max_train_samples=8, **changes), 3)
        first, *rest = str(caught.value).splitlines()
        assert first == (
            "out has runs with other settings; --output_dir names another folder, "
            "--overwrite_output_dir starts anew in its place"
        )
        assert sorted(rest) == [
            "learning_rate: they have 0.01, found 0.02",
            "max_train_samples: they have None, found 8",
            "seed: they have 42, found 43",
            next(line for line in rest if line.startswith("training_data: they have ")),
        ]
    assert contents("out") == before


@slow
def test_starting_anew_deletes_only_runs(summary: Summary) -> None:
    Path("out/notes.txt").write_text("mine")
    anew = run_seeds(recipe(learning_rate=0.02, overwrite_output_dir=True), 2)
    assert list(anew.runs) == ["seed-42", "seed-43"]
    assert anew.runs["seed-42"].metrics != summary.runs["seed-42"].metrics
    assert Path("out/notes.txt").read_text() == "mine" and not Path("out/seed-44").exists()
    assert run_seeds(recipe(learning_rate=0.02), 2) == anew


@slow
@pytest.mark.parametrize("changes", [{}, {"overwrite_output_dir": True}])
def test_a_folder_in_use_is_left_alone(summary: Summary, changes: dict[str, Any]) -> None:
    lock = RunLock(Path("out"))
    lock.acquire()
    before = contents("out/seed-42")
    with pytest.raises(CheckpointError, match="is running in this folder"):
        run_seeds(recipe(**changes), 3)
    assert contents("out/seed-42") == before and Path("out/runs.json").exists()
    lock.release()


@slow
def test_a_folder_with_something_else_is_refused(summary: Summary) -> None:
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"mine holds something else than these runs \(notes\.txt\)"):
        run_seeds(recipe(output_dir="mine"), 2)
    assert [path.name for path in Path("mine").iterdir()] == ["notes.txt"]
    train(recipe(output_dir="single", max_steps=1))
    before = contents("single")
    with pytest.raises(ConfigError, match="single holds something else than these runs"):
        run_seeds(recipe(output_dir="single"), 2)
    assert contents("single") == before
    with pytest.raises(ConfigError, match="is a file; a folder is needed"):
        run_seeds(recipe(output_dir="train.tsv"), 2)


@slow
def test_all_weights_stay_where_that_is_asked(summary: Summary) -> None:
    kept = run_seeds(recipe(output_dir="kept", max_steps=2), 2, keep_all_weights=True)
    assert len(list(Path("kept").glob("seed-*/model.safetensors"))) == 2
    assert Path(str(kept.best_model), "config.json").exists()


@slow
def test_nothing_to_compare_by_is_refused(summary: Summary, monkeypatch: pytest.MonkeyPatch) -> None:
    no_training(monkeypatch)
    Path("data").mkdir()
    shutil.copy("train.tsv", "data")
    for changes in ({"dev_file": None}, {"dev_file": None, "train_file": None, "data_dir": "data"}):
        with pytest.raises(ConfigError, match="several seeds are compared on a dev file: set dev_file"):
            run_seeds(recipe(output_dir="none", **changes), 2)
    with pytest.raises(
        ConfigError, match="metric_for_best_model: pearson is not measured with 2 labels; allowed: acc, f1"
    ):
        run_seeds(recipe(output_dir="none", metric_for_best_model="pearson"), 2)
    for seeds, first in ((0, 42), (3, 2**32 - 2)):
        with pytest.raises(ConfigError, match=f"seeds: expected .*, found {seeds} from {first} on"):
            run_seeds(recipe(output_dir="none", seed=first), seeds)
    assert not Path("none").exists()


class StopsAfter(logging.Handler):
    """SIGTERM's flag comes up when a line begins so."""

    def __init__(self, start: str) -> None:
        super().__init__()
        self.start = start

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith(self.start):
            stop_flag.request(signal.SIGTERM)


@slow
def test_a_stop_between_seeds_and_going_on(summary: Summary) -> None:
    handler, logger = StopsAfter("seed-43: loss "), logging.getLogger("bertpair.search.runs")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        with pytest.raises(StoppedError) as caught:
            run_seeds(recipe(output_dir="again"), 3)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert str(caught.value) == "stopped by SIGTERM: 2 of 3 runs are done; the same command goes on"
    assert caught.value.signum == signal.SIGTERM and not Path("again/seed-44").exists()
    stop_flag.clear()
    assert figures_of(run_seeds(recipe(output_dir="again"), 3)) == figures_of(summary)


@slow
@pytest.mark.parametrize("step", [1, 5])
def test_a_stop_within_a_seed_and_going_on(
    summary: Summary, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    original, taken = Stepper.step, []

    def stepped(self: Stepper, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        taken.append(args)
        if len(taken) == 6 + step:  # of the second seed
            stop_flag.request(signal.SIGTERM)

    monkeypatch.setattr(Stepper, "step", stepped)
    with pytest.raises(StoppedError, match="1 of 3 runs are done; the same command goes on"):
        run_seeds(recipe(output_dir="again"), 3)
    runs = json.loads(Path("again/runs.json").read_text())["runs"]
    assert list(runs) == ["seed-42"] and len(taken) == 6 + step
    stop_flag.clear()
    gone_on = run_seeds(recipe(output_dir="again"), 3)
    assert figures_of(gone_on) == figures_of(summary)
    assert gone_on.means == summary.means
    assert len(taken) == 18  # no step twice
    best = str(summary.best_model).removeprefix("out/")
    weights = [Path(folder, best, "model.safetensors").read_bytes() for folder in ("out", "again")]
    assert weights[0] == weights[1] and gone_on.best_model == f"again/{best}"


# Flags

FLAGS = "--model_name_or_path m --train_file t --dev_file d --output_dir o"


@pytest.mark.usefixtures("fresh_process")
def test_flags_of_several_runs() -> None:
    several = parse_command_line(f"{FLAGS} --seeds 5 --keep_all_weights".split(), "train").several
    assert several.is_asked and several.seeds == 5 and several.keep_all_weights
    assert several.sweep is several.folds is None
    parsed = parse_command_line(f"{FLAGS} --folds 4 --group_column 3".split(), "train")
    assert parsed.several.is_asked and parsed.several.folds == 4 and parsed.config.group_column == 3
    several = parse_command_line(f"{FLAGS} --sweep sweep.yaml".split(), "train").several
    assert several.is_asked and several.sweep == "sweep.yaml"
    assert not parse_command_line(FLAGS.split(), "train").several.is_asked


@pytest.mark.usefixtures("fresh_process")
@pytest.mark.parametrize(
    ("flags", "faults"),
    [
        ("--seeds 3 --folds 3", ["--seeds and --folds are different kinds of several runs: give only one"]),
        (
            "--sweep s --seeds 3",
            [
                "--sweep and --seeds are different kinds of several runs: give only one; "
                "a sweep's file says how many seeds"
            ],
        ),
        ("--sweep s --folds 3", ["--sweep and --folds are different kinds of several runs: give only one"]),
        ("--keep_all_weights", ["--keep_all_weights has no effect without --sweep, --seeds or --folds"]),
        (
            "--seeds 3 --resume",
            ["--resume: with --seeds, running the same command again goes on; leave --resume out"],
        ),
        ("--folds 3 --do_eval", ["do_eval alone trains nothing; --folds needs training"]),
        ("--seeds 3 --do_train", ["do_train alone measures nothing; --seeds needs do_eval too"]),
        (
            "--seeds 3 --seed 4294967294",
            ["--seeds: expected at least 1 seed and none above 4294967295, found 3 from 4294967294 on"],
        ),
        ("--seeds 1", ["--seeds: expected a whole number from 2 to 1000, or null, found 1"]),
        ("--folds 1", ["--folds: expected a whole number from 2 to 1000, or null, found 1"]),
        ("--seeds many", ["--seeds: expected a whole number from 2 to 1000, or null, found 'many'"]),
        (
            "--seeds 3 --folds 3 --group_column q --keep_all_weights --resume --learning_rate 7",
            [
                "--learning_rate: expected a number above 0 and at most 1, found '7'",
                "--seeds and --folds are different kinds of several runs: give only one",
                "--resume: with --seeds, running the same command again goes on; leave --resume out",
            ],
        ),
    ],
)
def test_flags_that_do_not_go_together(flags: str, faults: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_command_line(f"{FLAGS} {flags}".split(), "train")
    assert str(caught.value).splitlines() == faults


@pytest.mark.usefixtures("fresh_process")
def test_only_training_takes_these_flags() -> None:
    with pytest.raises(
        ConfigError, match="unknown setting --seeds: several seeds are asked for by a flag of train.py"
    ):
        parse_command_line("--model_dir m --seeds 3".split(), "evaluate")
    Path("own.yaml").write_text("model_name_or_path: m\ntrain_file: t\noutput_dir: o\nseeds: 3\n")
    with pytest.raises(
        ConfigError, match="own.yaml:4: unknown setting seeds: several seeds are asked for by a f"
    ):
        parse_command_line(["--config", "own.yaml"], "train")
