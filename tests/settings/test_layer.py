"""Layers: flags and files become typed settings, and later layers go over earlier ones."""

from pathlib import Path
from typing import Any

import pytest

from bertpair.settings.command_line import REPLACES, Names, file_layer, flag_layer, merge
from bertpair.settings.config import Config
from bertpair.settings.files import Layer


def flags(*argv: str) -> Layer:
    return flag_layer(argv, Names, "train", {}, "")[0]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def yaml(text: str) -> Layer:
    Path("c.yaml").write_text(text, encoding="utf-8")
    return file_layer("c.yaml", Names, "train")


def test_flags_and_files_give_the_same_settings() -> None:
    given = flags("--learning_rate", "1e-3", "--labels", "a", "b", "--fp16", "--text_b_column", "null")
    written = yaml("learning_rate: 1e-3\nlabels: [a, b]\nfp16: true\ntext_b_column: null\n")
    expected = {"learning_rate": 1e-3, "labels": ["a", "b"], "amp": "fp16", "text_b_column": None}
    assert given.values == written.values == expected
    assert given.where["amp"] == "--fp16" and written.where["amp"] == "c.yaml:3: fp16"


def test_the_settings_file_is_named_by_a_flag() -> None:
    def read(*argv: str) -> tuple[Layer, dict[str, Any]]:
        return flag_layer(argv, Names, "train", {}, "")

    assert read("--config", "c.yaml")[1] == {"config": "c.yaml"}
    assert read()[1] == {} and read("--config", "null")[1] == {"config": None}
    assert "--config: expected text without NUL" in read("--config", "a\0")[0].faults[0]


def test_faults_of_a_file_name_line_and_setting() -> None:
    layer = yaml("seed: x\nlearing_rate: 1\n\namp: fp32\nper_gpu_train_batch_size: 0\nsave_steps: 010\n")
    assert layer.faults == [
        "c.yaml:6: found '010'; write a plain decimal number, or quote it if it is text",
        "c.yaml:1: seed: expected a whole number from 0 to 4294967295, found 'x'",
        "c.yaml:2: unknown setting learing_rate; did you mean learning_rate?",
        "c.yaml:4: amp: expected one of auto, off, bf16, fp16, found 'fp32'",
        "c.yaml:5: per_gpu_train_batch_size: expected a whole number of at least 1, or null, found 0",
    ]
    assert {"seed", "amp", "save_steps"} <= layer.bad


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--fp16", "--amp", "bf16"], "--fp16 means amp 'fp16', found amp 'bf16' as well"),
        (["--no_cuda", "--device", "cuda"], "--no_cuda means device 'cpu', found device 'cuda' as well"),
        (
            ["--per_gpu_train_batch_size", "4", "--per_device_train_batch_size", "8"],
            "--per_gpu_train_batch_size means per_device_train_batch_size 4, "
            "found per_device_train_batch_size 8 as well",
        ),
    ],
)
def test_an_old_name_and_a_new_one_must_agree(argv: list[str], said: str) -> None:
    assert flags(*argv).faults == [said]
    assert flags("--fp16", "--amp", "fp16").faults == []


def test_later_layers_win() -> None:
    values, set_aside = merge([yaml("seed: 1\nsave_steps: 5"), flags("--seed", "2")])
    assert values == {"seed": 2, "save_steps": 5} and set_aside == []


@pytest.mark.parametrize(
    ("earlier", "later", "loser"),
    [
        ("warmup_ratio: 0.1", ["--warmup_steps", "10"], "warmup_ratio"),
        ("warmup_steps: 10", ["--warmup_ratio", "0.1"], "warmup_steps"),
        ("max_steps: 10", ["--num_train_epochs", "2"], "max_steps"),
        ("overwrite_output_dir: true", ["--resume"], "overwrite_output_dir"),
        ("resume: auto", ["--overwrite_output_dir"], "resume"),
        ("eval_strategy: epoch", ["--evaluate_during_training"], "eval_strategy"),
        ("eval_strategy: epoch", ["--eval_steps", "5"], "eval_strategy"),
        ("evaluate_during_training: true", ["--eval_strategy", "epoch"], "evaluate_during_training"),
    ],
)
def test_a_later_setting_sets_aside_the_one_it_makes_void(earlier: str, later: list[str], loser: str) -> None:
    below = yaml(earlier)
    values, set_aside = merge([below, flags(*later)])
    assert loser not in values
    assert set_aside == [(later[0], loser, below.values[loser])]


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        ("warmup_ratio: 0.1", ["--warmup_steps", "0"]),
        ("eval_strategy: epoch", ["--evaluate_during_training", "false"]),
        ("overwrite_output_dir: true", ["--resume", "false"]),
    ],
)
def test_a_setting_that_is_off_sets_nothing_aside(earlier: str, later: list[str]) -> None:
    assert merge([yaml(earlier), flags(*later)])[1] == []


def test_within_one_layer_nothing_is_set_aside() -> None:
    both = flags("--warmup_steps", "1", "--warmup_ratio", "0.1")
    for layers in ([both], [yaml("warmup_ratio: 0.2"), both]):
        assert merge(layers) == ({"warmup_steps": 1, "warmup_ratio": 0.1}, [])


def test_pairs_that_void_each_other_are_settings() -> None:
    assert {name for pair in REPLACES for name in pair} <= Config.model_fields.keys()
