"""Flags: words sorted by name, nothing guessed, every fault found."""

from collections.abc import Sequence
from typing import Annotated, Literal

import pytest
from pydantic import Field

from bertpair.settings.command_line import flag_layer
from bertpair.settings.config import Resume
from bertpair.settings.fields import Group, Labels, Path, Real, Switch, Whole, expected, setting
from bertpair.settings.files import Layer


class Fields(Group):
    data_dir: Path = setting(None, "Where the data is. Not given: here.", example="my_data")
    labels: Labels = None
    learning_rate: Real = setting(2e-5, "How fast.", gt=0, le=1)
    max_steps: Annotated[Whole, Field(ge=1, le=2**31 - 1)] | Literal[-1] = -1
    do_train: Switch = False
    resume: Resume = False


def read(*argv: str) -> Layer:
    return flag_layer(argv, Fields, "serve", {}, "")[0]


@pytest.mark.parametrize(
    "argv",
    [
        ("--data_dir", "d", "--do_train", "--max_steps", "-1", "--labels", "a", "b"),
        ("--data_dir=d", "--do_train=true", "--max_steps=-1", "--labels", "a", "b"),
    ],
)
def test_a_value_follows_its_flag_or_an_equals_sign(argv: Sequence[str]) -> None:
    flags = read(*argv)
    assert flags.values == {"data_dir": "d", "do_train": True, "max_steps": -1, "labels": ["a", "b"]}
    assert not (flags.faults or flags.notes or flags.bad)


def test_a_value_may_hold_an_equals_sign_or_begin_with_dashes() -> None:
    assert read("--data_dir=a=b").values == {"data_dir": "a=b"}
    assert read("--data_dir=--x").values == {"data_dir": "--x"}
    assert read("--data_dir=-x").values == {"data_dir": "-x"}
    assert read("--data_dir=").values == {"data_dir": None}
    assert read("--labels", "-", "+", "—").values == {"labels": ["-", "+", "—"]}


@pytest.mark.parametrize("word", ["-o", "-5x", "--o", "—output", "–o", "-_"])
def test_a_flag_is_not_taken_as_the_value_of_the_one_before(word: str) -> None:
    for name in ("data_dir", "labels", "max_steps"):
        found = read(f"--{name}", word, "out", "--do_train")
        assert found.values == {"do_train": True} and found.bad == {name}
        assert found.faults[0].endswith(f" {word}")
        assert found.faults[1:] == [f"--{name}: expected {expected(Fields)[name]}, found nothing"]
    for before in (["--do_train"], ["--data_dir", "d"], ["--labels", "a", "b"]):
        found = read(*before, word, "out")
        assert len(found.faults) == 1 and word in found.faults[0] and not found.bad


def test_a_flag_with_one_dash_is_told_its_name() -> None:
    assert read("--data_dir", "d", "-max_steps", "3").faults == [
        "flags begin with two dashes, found -max_steps; did you mean max_steps?"
    ]


@pytest.mark.parametrize("number", ["-1", "-1.5", "-.5"])
def test_a_negative_number_is_a_value(number: str) -> None:
    assert read("--labels", number, "0").values == {"labels": [number, "0"]}
    (fault,) = read("--learning_rate", number).faults
    assert "above 0" in fault


def test_bare_flags_are_switches_and_resume() -> None:
    assert read("--do_train", "--resume").values == {"do_train": True, "resume": "auto"}
    assert read("--resume", "out/checkpoint-2", "--do_train", "FALSE").values == {
        "resume": "out/checkpoint-2",
        "do_train": False,
    }


def test_all_faults_are_found() -> None:
    flags = read(
        "x",
        "--data_dir",
        "--do_train",
        "true",
        "false",
        "--labels",
        "--learning",
        "3",
        "--max_steps",
        "1",
        "2",
    )
    assert flags.faults == [
        "expected a flag such as --model_dir, found 'x'",
        "unknown setting --learning; did you mean learning_rate?",
        "--data_dir: expected a path, or null, found nothing",
        "--do_train: expected true or false, found 2 words, 'true false'",
        "--labels: expected a list of at least two labels, or null, found nothing",
        "--max_steps: expected a whole number of at least 1, or -1, found 2 words, '1 2'",
    ]
    assert flags.bad == {"data_dir", "do_train", "labels", "max_steps"} and not flags.values


@pytest.mark.parametrize("flag", ["--max_step", "--max", "--max-steps", "--MAX_STEPS"])
def test_beginnings_and_other_spellings_are_only_suggested(flag: str) -> None:
    (fault,) = read(flag, "3").faults
    assert fault == f"unknown setting {flag}; did you mean max_steps?"


def test_a_flag_given_again_with_another_value_is_said() -> None:
    flags = read("--max_steps", "1", "--max_steps", "2")
    assert flags.values == {"max_steps": 2}
    assert flags.notes == ["--max_steps is given more than once: the last, 2, counts"]
    assert read("--do_train", "--do_train").notes == []


def test_help_shows_name_meaning_range_default_and_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        flag_layer(["--help"], Fields, "serve", {"some": ["learning_rate"], "more": ["data_dir"]}, "usage")
    page = " ".join(capsys.readouterr().out.split())
    assert "some: --learning_rate How fast. A number above 0 and at most 1. Default: 2e-5." in page
    assert page.endswith(
        "more: --data_dir Where the data is. A path. Not given: here. Example: --data_dir my_data"
    )
    assert "--labels" not in page
