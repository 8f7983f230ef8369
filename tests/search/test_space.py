"""sweep.yaml: what it may say, what a grid is, and what is refused, all at once and with the line."""

import json
from pathlib import Path
from typing import Any

import pytest

from bertpair.errors import ConfigError
from bertpair.search.space import FIXED, MAX_POINTS, Sweep, read_sweep, with_params
from bertpair.settings.config import SETTINGS, Config

BASE = Config(model_name_or_path="m", train_file=["t.tsv"], dev_file=["d.tsv"], output_dir="out")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(text: str, **changes: Any) -> Sweep:
    Path("sweep.yaml").write_text(text, encoding="utf-8")
    return read_sweep("sweep.yaml", BASE.model_copy(update=changes))


def faults(text: str, **changes: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(text, **changes)
    return str(caught.value).splitlines()


def one_fault(values: str) -> str:
    """What is said of these values of a setting, without its place."""
    (line,) = faults(f"seeds: 2\nspace:\n  {values}\n")
    assert line.startswith("sweep.yaml:3: space: ")
    return line.removeprefix("sweep.yaml:3: space: ")


def test_a_sweep_as_it_should_be() -> None:
    text = """
space:
  learning_rate: {log: [1e-5, 1e-4]}
  warmup_ratio: {range: [0, 0.2]}
  per_device_train_batch_size: {int: [8, 32]}
  lr_scheduler_type: [linear, cosine]
  max_train_samples: [null, 100]
  group_by_length: [true, false]
sampler: tpe
trials: 20
seeds: 3
metric: macro_f1
prune: true
timeout: 1e3
storage: postgresql://host/sweeps
"""
    sweep = read(text)
    kinds = {each.name: (each.kind, each.edges) for each in sweep.space}
    assert list(kinds.items()) == [
        ("learning_rate", ("log", (1e-5, 1e-4))),
        ("warmup_ratio", ("range", (0.0, 0.2))),
        ("per_device_train_batch_size", ("int", (8, 32))),
        ("lr_scheduler_type", ("list", ("linear", "cosine"))),
        ("max_train_samples", ("list", (None, 100))),
        ("group_by_length", ("list", (True, False))),
    ]
    said = sweep.settings
    assert (said.sampler, said.trials, said.seeds, said.metric) == ("tpe", 20, 3, "macro_f1")
    assert said.prune and said.timeout == 1000 and said.storage == "postgresql://host/sweeps"
    assert sweep.num_points == 20


def test_what_is_not_said() -> None:
    said = read("space: {learning_rate: [1e-5]}").settings
    assert (said.sampler, said.trials, said.seeds, said.metric) == ("grid", None, 1, None)
    assert not said.prune and said.timeout is None and said.storage is None


def test_json_and_a_mapping_say_the_same() -> None:
    said = {"space": {"learning_rate": [1e-5, 2e-5]}, "seeds": 2}
    Path("sweep.json").write_text(json.dumps(said))
    sweeps = [read_sweep("sweep.json", BASE), read_sweep(said, BASE)]
    sweeps.append(read_sweep({"space": {"learning_rate": (1e-5, 2e-5)}, "seeds": 2}, BASE))  # a tuple
    assert all(each.space == sweeps[0].space and each.grid() == sweeps[0].grid() for each in sweeps)
    with pytest.raises(ConfigError, match=r"\Asweep.json: space: unknown setting lr; did you mean learning_"):
        Path("sweep.json").write_text('{"space": {"lr": [1]}}')
        read_sweep("sweep.json", BASE)
    with pytest.raises(ConfigError, match=r"\Aunknown setting 5\nspace must be set in the sweep: "):
        read_sweep({5: 1}, BASE)  # type: ignore[dict-item]


def test_a_grid_is_every_combination_the_last_setting_fastest() -> None:
    text = "space: {weight_decay: [0.1, 0], warmup_steps: {int: [3, 5]}}"
    expected = [(0.1, 3), (0.1, 4), (0.1, 5), (0.0, 3), (0.0, 4), (0.0, 5)]
    sweep = read(text)
    assert [tuple(params.values()) for params in sweep.grid()] == expected and sweep.num_points == 6
    assert list(sweep.grid()[0]) == ["weight_decay", "warmup_steps"]
    for trials in (1, 2, 4, 6, 100):
        cut = read(f"{text}\ntrials: {trials}")
        assert [tuple(params.values()) for params in cut.grid()] == expected[:trials]
        assert cut.num_points == min(trials, 6)


def test_trials_cut_a_range_of_billions() -> None:
    text = "space: {warmup_steps: {int: [0, 2147483647]}, weight_decay: [0.1, 0]}"
    (line,) = faults(text)
    assert line == (
        "sweep.yaml:1: space: the grid has 4,294,967,296 combinations; "
        f"at most {MAX_POINTS:,} can be tried: set trials"
    )
    assert [tuple(params.values()) for params in read(f"{text}\ntrials: 3").grid()] == [
        (0, 0.1),
        (0, 0.0),
        (1, 0.1),
    ]


def test_all_is_refused_at_once_and_in_order() -> None:
    text = """
sampler: bayes
trails: 4
seeds: 0
learning_rate: [1e-5]
timeout: 0
space:
  lerning_rate: [1e-5]
  seed: [1, 2]
  weight_decay: []
"""
    assert faults(text) == [
        "sweep.yaml:2: sampler: expected one of grid, random, tpe, found 'bayes'",
        "sweep.yaml:3: unknown setting trails; did you mean trials?",
        "sweep.yaml:4: seeds: expected a whole number from 1 to 1000, found 0",
        "sweep.yaml:5: unknown setting learning_rate: the settings to try stand under space",
        "sweep.yaml:6: timeout: expected a number above 0, or null, found 0",
        "sweep.yaml:8: space: unknown setting lerning_rate; did you mean learning_rate?",
        "sweep.yaml:9: space: seed is not a setting that a sweep can try; `seeds: 3` runs every trial with "
        "three",
        "sweep.yaml:10: space: weight_decay: expected a list of values, or log, range or int: [low, high]; "
        "found an empty list",
    ]


@pytest.mark.parametrize("text", ["", "# nothing\n", "seeds: 3\n"])
def test_a_sweep_without_a_space(text: str) -> None:
    assert faults(text) == ["space must be set in sweep.yaml: the settings to try, each with its values"]


@pytest.mark.parametrize(
    ("space", "found"), [("", "none"), ("{}", "none"), ("[]", "none"), ("5", "5"), ("[1]", "a list")]
)
def test_a_space_of_nothing(space: str, found: str) -> None:
    text = f"seeds: 3\nspace: {space}\n"
    assert faults(text) == [f"sweep.yaml:2: space: expected the settings to try, found {found}"]


def test_a_file_that_is_none() -> None:
    with pytest.raises(ConfigError, match=r"\Anothing\.yaml: no such settings file"):
        read_sweep("nothing.yaml", BASE)
    assert faults("space: {a: [1]")[0].startswith("sweep.yaml:1: not YAML that can be read")
    assert faults("- space\n") == ["sweep.yaml:1: expected lines of `name: value`, found no mapping"]
    assert faults("space: {weight_decay: [0]}\nspace: {weight_decay: [1]}") == [
        "sweep.yaml:2: space is given twice"
    ]
    twice = "space:\n  weight_decay: [0]\n  weight_decay: [1]\n"
    assert faults(twice) == ["sweep.yaml:3: 'weight_decay' is given twice"]


def test_every_setting_can_be_tried_or_not() -> None:
    for name in FIXED:
        assert name in SETTINGS
        assert one_fault(f"{name}: [1]").startswith(f"{name} is not a setting that a sweep can try")
    for name in ("dev_file", "max_eval_samples"):
        said = f"{name} is not a setting that a sweep can try: all trials need the same dev rows"
        assert one_fault(f"{name}: [1]") == said
    for name in ("trials", "sampler", "seeds", "metric", "storage"):  # indented by mistake
        assert one_fault(f"{name}: 3") == f"{name} stands beside space, not under it"


EXPECTED = "expected a list of values, or log, range or int: [low, high]; found "
RANGE = "expected log, range or int with [low, high]; found "


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ("weight_decay: 5", EXPECTED + "5"),
        ("weight_decay: null", EXPECTED + "null"),
        ("lr_scheduler_type: linear", EXPECTED + "'linear'"),
        ("weight_decay: [0, much]", "expected a number of at least 0 and at most 100, found 'much'"),
        ("max_seq_length: [64, 64.5]", "expected a whole number from 5 to 65535, found 64.5"),
        ("learning_rate: [0]", "expected a number above 0 and at most 1, found 0"),
        ("group_by_length: [true, 1]", "expected true or false, found 1"),
        ("weight_decay: [0.1, 0.10]", "0.1 is given twice"),
        ("learning_rate: [1e-5, 0.00001]", "1e-05 is given twice"),
        ("lr_scheduler_type: [linear, linear]", "'linear' is given twice"),
        ("labels: [[a, b], [a, b]]", "a list is given twice"),
        ("weight_decay: {}", RANGE + "nothing"),
        ("weight_decay: {lag: [0, 1]}", RANGE + "lag"),
        ("weight_decay: {log: [0, 1], range: [0, 1]}", RANGE + "log and range"),
        ("weight_decay: {range: [0, 0.1, 1]}", RANGE + "range with a list of 3"),
        ("weight_decay: {range: [0]}", RANGE + "range with a list of 1"),
        ("weight_decay: {range: []}", RANGE + "range with a list"),
        ("weight_decay: {range: 5}", RANGE + "range with 5"),
        ("weight_decay: {range: [1, 0]}", "the range is upside down or empty: found [1, 0]"),
        ("warmup_steps: {int: [5, 5]}", "the range is upside down or empty: found [5, 5]"),
        ("learning_rate: {log: [1e-4, 1e-5]}", "the range is upside down or empty: found [0.0001, 1e-05]"),
        ("weight_decay: {log: [0, 1]}", "log needs a low end above 0, found 0"),
        ("weight_decay: {int: [0, 1]}", "int does not suit this setting; use range or log"),
        ("warmup_steps: {log: [1, 9]}", "log does not suit this setting; use int"),
        ("warmup_steps: {range: [1, 9]}", "range does not suit this setting; use int"),
        ("warmup_steps: {int: [1, 9.5]}", "expected a whole number of at least 0, found 9.5"),
        ("group_by_length: {int: [false, true]}", "int does not suit this setting; use a list of values"),
        ("text_b_column: {int: [1, b]}", "int does not suit this setting; use a list of values"),
        ("max_train_samples: {int: [1, null]}", "int does not suit this setting; use a list of values"),
        (
            "lr_scheduler_type: {log: [linear, cosine]}",
            "log does not suit this setting; use a list of values",
        ),
    ],
)
def test_values_that_are_refused(values: str, fault: str) -> None:
    assert one_fault(values) == f"{values.partition(':')[0]}: {fault}"


def test_a_grid_takes_no_range() -> None:
    text = "space:\n  learning_rate: {log: [1e-5, 1e-4]}\n  weight_decay: {range: [0, 1]}\n"
    assert faults(text) == [
        f"sweep.yaml:{line}: space: {name}: a grid needs a list; random and tpe take ranges"
        for line, name in ((2, "learning_rate"), (3, "weight_decay"))
    ]
    for sampler in ("random", "tpe"):
        assert read(f"{text}sampler: {sampler}\ntrials: 7\n").num_points == 7
        (line,) = faults(f"{text}sampler: {sampler}\n")
        assert line == f"sweep.yaml:4: sampler: {sampler} needs trials, the number of combinations to try"


SPACE = "space: {weight_decay: [0, 0.1]}\n"


@pytest.mark.parametrize("lacks", [{"dev_file": None}, {"do_eval": False}])
def test_there_is_nothing_to_choose_by(lacks: dict[str, Any]) -> None:
    said = "a sweep needs a dev file to choose by: set dev_file, or data_dir with a dev.tsv"
    assert faults(SPACE, do_train=True, **lacks) == [said]
    assert read(SPACE, dev_file=None, data_dir="data").num_points == 2


def test_seeds_have_an_end() -> None:
    assert read(f"{SPACE}seeds: 3", seed=2**32 - 3).settings.seeds == 3
    said = "expected at least 1 seed and none above 4294967295, found 3 from 4294967294 on"
    assert faults(f"{SPACE}seeds: 3", seed=2**32 - 2) == [f"sweep.yaml:2: seeds: {said}"]
    read(SPACE, seed=2**32 - 1)


def test_pruning_needs_seeds() -> None:
    for seeds in (1, 2):
        said = f"prune: no trial can be stopped with fewer than 3 seeds, found {seeds}"
        assert faults(f"{SPACE}prune: true\nseeds: {seeds}") == [f"sweep.yaml:2: {said}"]
    assert read(f"{SPACE}prune: true\nseeds: 3").settings.prune


def test_combinations_that_contradict_are_refused_before_any_runs() -> None:
    text = "space:\n  lr_scheduler_type: [linear, constant]\n  warmup_ratio: [0, 0.1]\n"
    constant = "lr_scheduler_type constant has no warm-up: use constant_with_warmup"
    assert faults(text) == [
        f"sweep.yaml:1: space: with lr_scheduler_type 'constant', warmup_ratio 0.1: {constant}"
    ]
    (line,) = faults("space: {lr_scheduler_type: [linear, constant]}", warmup_steps=5)
    assert line == f"sweep.yaml:1: space: with lr_scheduler_type 'constant': {constant}"
    ranges = "space: {warmup_ratio: {range: [0, 0.5]}}\nsampler: random\ntrials: 3\n"
    assert constant in faults(ranges, lr_scheduler_type="constant")[0]  # at one end of the range
    two = faults("space: {warmup_ratio: [0, 0.1], warmup_steps: [0, 5]}")
    assert two == [
        "sweep.yaml:1: space: with warmup_ratio 0.1, warmup_steps 5: "
        "warmup_steps 5 and warmup_ratio 0.1 are two warm-ups: set only one"
    ]
    patience = faults("space: {early_stopping_patience: [null, 2], eval_strategy: [no, epoch]}")
    assert patience == [
        "sweep.yaml:1: space: with early_stopping_patience 2, eval_strategy 'no': "
        "early_stopping_patience needs an eval_strategy, found no"
    ]


@pytest.mark.parametrize(
    ("before", "params", "after"),
    [
        ({"warmup_steps": 100}, {"warmup_ratio": 0.1}, {"warmup_steps": 0}),
        ({"warmup_steps": 100}, {"warmup_ratio": 0.0}, {"warmup_steps": 0}),  # none means none
        ({"warmup_ratio": 0.1}, {"warmup_steps": 5}, {"warmup_ratio": 0.0}),
        ({"warmup_ratio": 0.1}, {"warmup_steps": 0}, {"warmup_ratio": 0.0}),
        ({"warmup_ratio": 0.1}, {"weight_decay": 0.5}, {"warmup_ratio": 0.1}),
        ({"max_steps": 100}, {"num_train_epochs": 2.0}, {"max_steps": -1}),
        ({"max_steps": 100}, {"num_train_epochs": 2.0, "max_steps": 50}, {"max_steps": 50}),
        ({"num_train_epochs": 2.0}, {"max_steps": 50}, {"num_train_epochs": 2.0}),
        ({"eval_strategy": "no"}, {"eval_steps": None}, {"eval_strategy": "no"}),
        (
            {"eval_strategy": "steps", "evaluate_during_training": True},
            {"eval_strategy": "epoch"},
            {"evaluate_during_training": False},
        ),
    ],
)
def test_a_value_sets_aside_what_it_replaces(
    before: dict[str, Any], params: dict[str, Any], after: dict[str, Any]
) -> None:
    config = with_params(BASE.model_copy(update=before), params)
    found = {name: getattr(config, name) for name in {**after, **params}}
    assert found == {**after, **params}
    others = SETTINGS.keys() - before.keys() - found.keys()
    assert all(getattr(config, name) == getattr(BASE, name) for name in others)
