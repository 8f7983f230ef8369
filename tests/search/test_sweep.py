"""One worker of a sweep: what it runs and in which order, what it keeps, what it says, and how it goes on."""

import json
import logging
import re
import signal
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import yaml
from conftest import write_tiny_bert
from sweeping import base, figure, pretend, rows

from bertpair import Config, ConfigError, StoppedError, TrainingError, sweep, train
from bertpair.console import stop_flag
from bertpair.search import runs
from bertpair.search.study import stored

GRID = {"space": {"weight_decay": [0.0, 0.1], "learning_rate": [1e-3, 2e-3]}, "seeds": 3}
LINES = [(i, "a cat", word, label) for i, (word, label) in enumerate([("sat", "yes"), ("mat", "no")] * 6)]


@pytest.fixture(autouse=True)
def files(fresh_process: None, tmp_path: Path, write_tsv: Callable[..., Path]) -> None:
    write_tiny_bert(tmp_path / "tiny")
    write_tsv("train.tsv", LINES, ("index", "text_a", "text_b", "label"))
    write_tsv("dev.tsv", LINES[:5], ("index", "text_a", "text_b", "label"))


@pytest.mark.slow
def test_a_trial_is_the_mean_of_the_runs_of_its_seeds() -> None:
    result = sweep(base(), {"space": {"learning_rate": [1e-2, 1e-4]}, "seeds": 2, "metric": "loss"})
    assert {trial.settings["learning_rate"] for trial in result.trials} == {1e-2, 1e-4}
    for trial in result.trials:
        alone = {
            seed: train(base(f"alone-{trial.number}-{seed}", seed=seed, **trial.settings)).metrics["loss"]
            for seed in (42, 43)
        }
        assert trial.figures == alone
        assert trial.mean == statistics.fmean(alone.values())
        assert trial.deviation == statistics.stdev(alone.values())
    means = [trial.mean for trial in result.trials]
    assert means == sorted(means)  # less loss is better
    best = result.trials[0]
    seed = min(best.figures, key=best.figures.__getitem__)
    assert result.best_model == f"out/trial-{best.number:03}/seed-{seed}"
    model = Path(result.best_model, "model.safetensors").read_bytes()
    assert model == Path(f"alone-{best.number}-{seed}", "model.safetensors").read_bytes()
    assert [path.parent for path in Path("out").rglob("model.safetensors")] == [Path(result.best_model)]
    for trial in result.trials:
        for seed in trial.figures:
            left = {path.name for path in Path(f"out/trial-{trial.number:03}/seed-{seed}").iterdir()}
            assert {"predictions.tsv", "eval_results.json", "training_args.yaml"} <= left
    assert Path("out/sweep.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in Path("out/report.html").read_bytes()
    again = train(Config(**yaml.safe_load(Path("out/best_config.yaml").read_text())))
    assert again.metrics["loss"] == best.figures[42] and again.output_dir == "out-best"


def test_a_grid_is_run_in_order_and_ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    done = pretend(monkeypatch)
    result = sweep(base(), GRID)
    assert done == [(f"trial-{k:03}", seed) for k in range(4) for seed in (42, 43, 44)]
    best = result.trials[0]
    assert best.settings == {"weight_decay": 0.1, "learning_rate": 1e-3} and best.number == 2
    expected = [figure(base(seed=seed, **best.settings)) for seed in (42, 43, 44)]
    assert list(best.figures.values()) == expected and best.mean == statistics.fmean(expected)
    assert result.best_model == "out/trial-002/seed-44" and result.table.splitlines()[1].startswith("0.1 ")
    assert result.summary()["best_settings"] == best.settings
    left = sorted(path.parent for path in Path("out").rglob("runs.json"))
    assert len(left) == 4 and Path("out/sweep.png").exists()
    digests = {json.loads((folder / "runs.json").read_text())["dev_data"] for folder in left}
    assert len(digests) == 1 and digests != {None}, "trials can be compared"
    lines = Path("out/sweep_results.tsv").read_text().splitlines()
    assert len(lines) == 5 and lines[1].startswith(f"002\t0.1\t0.001\t{best.mean!r}\t{best.deviation!r}\t")
    page = Path("out/report.html").read_text("utf-8")
    assert all(f">{k:03}<" in page for k in range(4)) and f"{best.mean:.4f}" in page
    assert (
        "--weight_decay 0.1 " in page and "--learning_rate 0.001 " in page and "--output_dir out-best" in page
    )


def test_a_sweep_that_is_done_is_read_again_and_more_trials_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    done = pretend(monkeypatch)
    plan = {**GRID, "trials": 3, "seeds": 1}
    first = sweep(base(), plan)
    assert len(done) == 3
    assert rows(sweep(base(), plan)) == rows(first) and len(done) == 3
    assert len(sweep(base(), {**plan, "trials": 4}).trials) == 4
    assert done[3:] == [("trial-003", 42)]


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_what_is_drawn_depends_on_the_seed_alone(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    space = {"learning_rate": {"log": [1e-4, 1e-2]}, "weight_decay": {"range": [0.0, 0.5]}}
    plan = {"space": {**space, "warmup_steps": {"int": [0, 9]}}, "sampler": sampler, "trials": 6}
    one, two = sweep(base(), plan), sweep(base("other"), plan)
    assert rows(one) == rows(two) != rows(sweep(base("third", seed=7), plan))
    for trial in one.trials:
        values = trial.settings
        assert 1e-4 <= values["learning_rate"] <= 1e-2 and 0 <= values["weight_decay"] <= 0.5
        assert values["warmup_steps"] in range(10) and type(values["warmup_steps"]) is int
    assert len({trial.settings["learning_rate"] for trial in one.trials}) == 6


def test_tpe_begins_with_the_settings_as_they_are_if_the_space_has_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch)
    plan = {"space": {"learning_rate": {"log": [1e-5, 1e-2]}}, "sampler": "tpe", "trials": 2}
    (first,) = [trial for trial in sweep(base(), plan).trials if trial.number == 0]
    assert first.settings == {"learning_rate": 2e-5}
    plan = {"space": {"learning_rate": {"log": [1e-3, 1e-2]}}, "sampler": "tpe", "trials": 2}
    assert all(trial.settings["learning_rate"] >= 1e-3 for trial in sweep(base("other"), plan).trials)


def test_tpe_finds_better_settings_than_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, lambda config: 1 - abs(config.weight_decay - 0.7))
    plan = {"space": {"weight_decay": {"range": [0.0, 100.0]}}, "trials": 25}
    found = {name: sweep(base(name), {**plan, "sampler": name}).trials[0].mean for name in ("random", "tpe")}
    assert (found["tpe"] or 0) > (found["random"] or 0)


def test_values_of_any_kind_come_back_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    pretend(monkeypatch, lambda config: seen.append(config.class_weights) or 0.5)  # type: ignore[func-returns-value]
    weights = [None, "balanced", {"yes": 2.0, "no": 1.0}]
    result = sweep(base(), {"space": {"class_weights": weights, "group_by_length": [True, False]}})
    assert seen == [each for each in weights for _ in range(2)]
    assert [trial.settings["class_weights"] for trial in result.trials] == seen
    assert {trial.settings["group_by_length"] for trial in result.trials} == {True, False}


def test_a_trial_that_is_clearly_behind_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    done = pretend(monkeypatch)
    result = sweep(base(), {**GRID, "seeds": 4, "prune": True})
    assert [trial.status for trial in result.trials] == ["done", "done", "stopped early", "stopped early"]
    assert [len(trial.figures) for trial in result.trials] == [4, 4, 2, 2]
    assert len(done) == 12 and Path("out/sweep_results.tsv").read_text().count("stopped early") == 2
    assert rows(sweep(base(), {**GRID, "seeds": 4, "prune": True})) == rows(result) and len(done) == 12


def test_a_trial_that_fails_is_told_apart_and_not_run_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def measure(config: Config) -> float:
        if config.learning_rate > 1e-3:
            raise TrainingError("11 steps in a row were not finite\nmore")
        return float("nan") if config.weight_decay else figure(config)

    done = pretend(monkeypatch, measure)
    result = sweep(base(), GRID)
    assert [trial.status for trial in result.trials] == [
        "done",
        "failed: 11 steps in a row were not finite",
        "failed: acc is not a finite number",
        "failed: 11 steps in a row were not finite",
    ]
    assert "trial 1, weight_decay 0, learning_rate 0.002: 11 steps" in caplog.text
    assert len(sweep(base(), GRID).trials) == 4 and len(done) == 4
    assert Path("out/best_config.yaml").exists()


def test_no_trial_that_works_is_a_table_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(config: Config) -> float:
        raise TrainingError("no")

    pretend(monkeypatch, measure)
    result = sweep(base(), GRID)
    assert {trial.mean for trial in result.trials} == {None} and result.best_model is None
    assert result.summary()["best_settings"] is None and not Path("out/best_config.yaml").exists()


def test_a_stop_leaves_whole_results_and_the_same_call_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(config: Config) -> float:
        if config.learning_rate == 2e-3 and config.seed == 43 and not config.weight_decay:
            stop_flag.request(signal.SIGTERM)
            stop_flag.raise_if_set()
        return figure(config)

    pretend(monkeypatch, measure)
    with pytest.raises(StoppedError, match="1 of 4 trials are done; the same command goes on"):
        sweep(base(), GRID)
    stop_flag.clear()
    assert len(Path("out/sweep_results.tsv").read_text().splitlines()) == 2
    done = pretend(monkeypatch)
    result = sweep(base(), GRID)
    assert done[:2] == [("trial-001", 43), ("trial-001", 44)] and len(done) == 8  # seed 42 was done
    assert rows(result) == rows(sweep(base("whole"), GRID))


def test_a_timeout_starts_no_further_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    clock = [0.0]

    def measure(config: Config) -> float:
        clock[0] += 1  # a second for each run
        return figure(config)

    done = pretend(monkeypatch, measure)
    own_time = SimpleNamespace(monotonic=lambda: clock[0], sleep=time.sleep)
    monkeypatch.setattr("bertpair.search.sweep.time", own_time)
    result = sweep(base(), {**GRID, "timeout": 3.5})
    assert len(done) == 4 and len(result.trials) == 1  # the fourth run was begun in time
    assert "timeout: 3.5 seconds have passed; the same command goes on" in caplog.text
    assert len(sweep(base(), GRID).trials) == 4 and len(done) == 12


def test_a_line_tells_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    pretend(monkeypatch)
    sweep(base(), GRID)
    said = [line for line in caplog.messages if line.startswith("trial ")]
    assert said[0].startswith("trial 0, weight_decay 0, learning_rate 0.001: acc 0.5100 ± 0.0100; 1 of 4 ")
    best = "best so far 0.5100 ± 0.0100 with weight_decay 0, learning_rate 0.001"
    assert re.search(rf"; {best}; about \d+ s left$", said[0])
    assert said[-1].startswith("trial 3, ") and said[-1].endswith("weight_decay 0.1, learning_rate 0.001")


def test_another_sweep_does_not_go_into_the_same_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    done = pretend(monkeypatch)
    plan = {**GRID, "seeds": 1}
    sweep(base(), plan)
    with pytest.raises(ConfigError, match=r"out has runs with other settings; .*\nadam_beta1: they have 0.9"):
        sweep(base(adam_beta1=0.8), plan)
    with pytest.raises(ConfigError, match="seeds: they have 1, found 2"):
        sweep(base(), {**plan, "seeds": 2})
    Path("train.tsv").write_text(Path("train.tsv").read_text() + "9\ta\tmat\tno\n")
    with pytest.raises(ConfigError, match="training_data"):
        sweep(base(), plan)
    sweep(base(overwrite_output_dir=True), {**plan, "seeds": 2})
    assert len(done) == 4 + 8
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("keep")
    with pytest.raises(ConfigError, match=r"mine holds something else than these runs \(notes.txt\)"):
        sweep(base("mine"), plan)
    sweep(base("mine", overwrite_output_dir=True), plan)
    assert Path("mine/notes.txt").read_text() == "keep"


def test_a_storage_that_cannot_be_used_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    for url, said in (
        ("postgresql://me:secret@127.0.0.1:9/x", r"postgresql://…@127.0.0.1:9/x cannot be used: .*refused"),
        ("oracle://me:secret@host/x", "needs another package"),
        ("nonsense", "cannot be used"),
    ):
        with pytest.raises(ConfigError, match=f"storage: .*{said}") as caught:
            sweep(base(), {**GRID, "storage": url})
        assert "secret" not in str(caught.value)
    Path("broken").mkdir()
    pretend(monkeypatch)
    sweep(base("broken"), GRID)
    Path("broken/sweep.db").write_bytes(b"no database" * 500)
    with pytest.raises(ConfigError, match="the sweep's SQLite file cannot be used: .*not a database"):
        sweep(base("broken"), GRID)


def test_workers_may_have_devices_and_threads_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    done = pretend(monkeypatch)
    first = sweep(base(), GRID)
    other = base(num_threads=2, device="cpu", logging_steps=3)
    assert rows(sweep(other, GRID)) == rows(first) and len(done) == 12


def test_weights_are_kept_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Path] = []
    monkeypatch.setattr(runs, "drop_weights", kept.append)
    pretend(monkeypatch)
    sweep(base(), GRID, keep_all_weights=True)
    assert not kept


def test_a_folder_may_have_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    for name in ("a b", "50%20", "what?", "{SCHEMA_VERSION}", "a#b", "größe 大"):
        assert len(sweep(base(name), {"space": {"weight_decay": [0.0]}}).trials) == 1
        assert Path(name, "sweep.db").exists()


def test_optuna_reads_the_file_as_its_dashboard_does(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    result = sweep(base(), GRID)
    (study,) = optuna.get_all_study_summaries("sqlite:///out/sweep.db")
    assert study.best_trial is not None and study.best_trial.params == result.trials[0].settings
    assert study.n_trials == 4 and study.best_trial.value == result.trials[0].mean


def test_nothing_that_a_value_is_stored_as_collides() -> None:
    from bertpair.search.space import Dimension

    values: tuple[Any, ...] = (None, True, 3, 0.5, "a", {"a": 1.0}, ["x"])
    kept = [stored(Dimension("x", values), value) for value in values]
    assert len({repr(value) for value in kept}) == len(values)
