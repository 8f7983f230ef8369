"""What a field may hold: what each type takes from YAML and from words, and how it refuses."""

from pathlib import Path as FilePath
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from bertpair.errors import plain, show
from bertpair.settings.config import SETTINGS, Reports, Resume
from bertpair.settings.fields import (
    NO,
    Amp,
    Column,
    Device,
    Group,
    Labels,
    Path,
    Paths,
    Real,
    Switch,
    Weights,
    Whole,
    from_words,
    setting,
    suggest,
    typed,
)


class Fields(Group):
    """One of each."""

    real: Real = 0.0
    rate: Real = setting(0.5, "", gt=0, le=1)
    part: Real = setting(0.5, "", ge=0.0, lt=1)
    steps: Annotated[Whole, Field(ge=1, le=2**31 - 1)] | Literal[-1] = -1
    few: Whole = setting(0, "", ge=0, le=9)
    many: Whole = setting(1, "", ge=1)
    switch: Switch = False
    maybe: Switch | None = None
    amp: Amp = "auto"
    when: Annotated[Literal["no", "steps"], NO] = "no"
    schedule: Literal["linear", "cosine"] = "linear"
    path: Path = None
    paths: Paths = None
    labels: Labels = None
    weights: Weights = None
    column: Column = "auto"
    second: Column | None = None
    header: Literal["auto"] | Switch = "auto"
    device: Device = "auto"
    resume: Resume = False
    reports: Reports = ["none"]


def sound(name: str, value: object) -> Any:
    values, faults = typed(Fields, {name: value})
    assert not faults
    return values[name]


def read(name: str, *words: str) -> Any:
    return from_words(words, Fields.model_fields[name].annotation)


def worded(name: str, *words: str) -> Any:
    return sound(name, read(name, *words))


def refusal(name: str, value: object) -> str:
    values, faults = typed(Fields, {name: value, "switch": True})
    assert values == {"switch": True}, "the others keep their values"
    return faults[name]


@pytest.mark.parametrize("text", ["2e-5", "2E-05", ".00002", "+2e-5", "0.00002"])
def test_a_float_may_be_text_since_pyyaml_reads_2e_5_so(text: str) -> None:
    assert sound("rate", text) == worded("rate", text) == 2e-5


@pytest.mark.parametrize(
    "value", ["nan", "inf", "-inf", float("nan"), float("inf"), "1_0", " 1", "", "٣", True, None, [], 10**400]
)
def test_a_number_is_finite_and_plain(value: object) -> None:
    assert refusal("real", value).startswith("expected a number, found ")


def test_bounds_hold_at_their_edges() -> None:
    assert sound("rate", 1) == 1.0 and isinstance(sound("rate", 1), float)
    for value in (0, 1.0000001, -1):
        assert "expected a number above 0 and at most 1, found" in refusal("rate", value)
    assert sound("part", 0.0) == 0.0
    assert "of at least 0 and below 1" in refusal("part", 1)


def test_whole_numbers_are_neither_text_nor_floats_nor_switches() -> None:
    assert sound("steps", 3) == 3 and sound("steps", -1) == -1
    for value in ("3", 3.0, True, 0, -2, 2**31, None):
        assert refusal("steps", value).startswith("expected a whole number of at least 1, or -1, found ")
    assert worded("steps", "3") == 3 and worded("steps", "-1") == -1
    assert "'3.0'" in refusal("steps", read("steps", "3.0"))
    assert refusal("few", 10) == "expected a whole number from 0 to 9, found 10"
    assert refusal("many", 2**31) == "expected a whole number of at least 1, found 2147483648"


def test_a_switch_is_bare_true_or_false() -> None:
    assert (
        worded("switch") is True and worded("switch", "true") is True and worded("switch", "False") is False
    )
    assert refusal("maybe", read("maybe", "yes")) == "expected true or false, or null, found 'yes'"
    for value in ("true", 1, 0):
        assert refusal("maybe", value).startswith("expected true or false")
    assert worded("maybe", "null") is None and worded("maybe") is True


def test_a_choice_takes_yamls_false_for_off_and_no() -> None:
    assert sound("amp", False) == "off" and sound("when", False) == "no"
    assert "found true" in refusal("amp", True)
    assert "found false" in refusal("schedule", False)
    assert refusal("schedule", "c") == "expected one of linear, cosine, found 'c'"


def test_paths_are_one_or_several() -> None:
    assert sound("paths", "a.tsv") == ["a.tsv"] == worded("paths", "a.tsv")
    assert worded("paths", "a", "b") == ["a", "b"] and worded("paths", "null") is None
    assert sound("paths", FilePath("x/y")) == ["x/y"] and sound("path", FilePath("x/y")) == "x/y"
    for value in ([], "", [""], [None], ["a", 3], 3, ["a\0b"], [["a"]]):
        refusal("paths", value)


def test_empty_text_means_not_set_as_in_run_glue() -> None:
    assert sound("path", "") is None and worded("path", "") is None and worded("path", "null") is None


def test_labels_that_yaml_read_as_something_else_are_refused_with_quote_it() -> None:
    assert sound("labels", ["yes", "no"]) == ["yes", "no"] == worded("labels", "yes", "no")
    assert sound("labels", [0, 1]) == ["0", "1"]
    for value in (True, False, None, 1.0):
        assert "quote it" in refusal("labels", ["a", value])
    assert "more than once" in refusal("labels", [1, "1"])
    assert "at least two labels, found 'a'" in refusal("labels", ["a"])
    for value in ([], ["a"], "a", {}, ["a", " "], ["a", ["b"]]):
        refusal("labels", value)


def test_class_weights_by_word_and_by_mapping() -> None:
    assert worded("weights", "balanced") == "balanced" and worded("weights", "null") is None
    assert worded("weights", "a=b=2", "c=5e-1") == {"a=b": 2.0, "c": 0.5}
    assert sound("weights", {0: 1, "x": "2e-1"}) == {"0": 1.0, "x": 0.2}
    assert "quote it" in refusal("weights", {True: 1})
    for weight in (0, 1e308, 1e-320, 1e7):  # a sum of losses so weighted is nothing that float32 holds
        assert "at least 1e-06 and at most 1e+06" in refusal("weights", {"a": weight})
    for value in ({}, "even", 3, [1, 2], {"a": None}):
        refusal("weights", value)


def test_columns_are_names_or_numbers() -> None:
    assert worded("column", "-1") == -1 and worded("column", "text") == "text"
    assert sound("column", "3") == "3", "quoted in YAML a number is a header name"
    assert worded("second", "null") is None
    for value in (None, True, 1.5):
        assert "quote it" in refusal("column", value)
    for value in ("", [1], 10**20):
        refusal("column", value)


def test_resume_header_device_and_reports() -> None:
    assert worded("resume") == "auto" == worded("resume", "true") == sound("resume", True)
    assert worded("resume", "false") is False and worded("resume", "out/checkpoint-3") == "out/checkpoint-3"
    assert worded("header", "auto") == "auto" and worded("header", "false") is False
    assert worded("device", "cuda:1") == "cuda:1"
    assert sound("reports", "none") == ["none"] == worded("reports", "none")
    for name, value in [
        ("resume", None),
        ("resume", 0),
        ("header", "yes"),
        ("device", "gpu"),
        ("device", "cuda:"),
        ("device", "cpu\n"),
        ("reports", ["wandb"]),
    ]:
        refusal(name, value)


def test_what_was_found_is_shown_short_and_on_one_line() -> None:
    assert [show(value) for value in (None, True, [1], {}, 2e-5)] == [
        "null",
        "true",
        "a list",
        "a mapping",
        "2e-05",
    ]
    assert len(show("x" * 500)) < 70 and "\n" not in show("a\nb") and "\x1b" not in show("\x1b[1m")
    assert show(1 << 20_000) == "a very long number"
    assert plain("learning_rate") == "learning_rate" and "\x1b" not in plain("a\x1b[1m")


def test_near_misses_are_suggested() -> None:
    known = ["learning_rate", "eval_steps", "eval_strategy", "seed"]
    assert suggest("learing_rate", known) == "; did you mean learning_rate?"
    assert suggest("--learning-rate", known) == "; did you mean learning_rate?"
    assert suggest("eval", known) == "; did you mean eval_steps or eval_strategy?"
    assert suggest("zzzz", known) == suggest("", known) == ""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lr", "; did you mean learning_rate?"),
        ("epochs", "; did you mean num_train_epochs?"),
        ("batch_size", "; did you mean per_device_train_batch_size?"),
        ("--batch-size", "; did you mean per_device_train_batch_size?"),
        ("bf16", ": mixed precision is set by amp: bf16"),
        ("gpu", ": the GPU is chosen by device: cuda, or cuda:1 for the second"),
        ("validation_file", "; did you mean dev_file?"),
        ("gradient_checkpointing", ": there is none; a smaller per_device_train_batch_size with more "),
        ("model", "; did you mean model_name_or_path?"),
        ("seeds", ": several seeds are asked for by a flag of train.py: --seeds 5"),
    ],
)
def test_the_fields_other_spellings_lead_to_a_setting_or_a_sentence(name: str, said: str) -> None:
    assert suggest(name, SETTINGS).startswith(said)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(sorted(Fields.model_fields)), anything)
def test_any_value_is_accepted_for_good_or_refused_in_words(name: str, value: object) -> None:
    values, faults = typed(Fields, {name: value})
    if faults:
        assert faults[name].startswith("expected ") and "\n" not in faults[name]
    else:
        again = sound(name, values[name])
        assert again == values[name], "what was accepted once is accepted again, unchanged"
