"""Kinds of values: what each takes from YAML and from words, and how it refuses."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bertpair.errors import plain, show
from bertpair.settings.values import (
    COLUMN,
    DEVICE,
    HEADER,
    LABELS,
    PATH,
    PATHS,
    REPORTS,
    RESUME,
    SWITCH,
    WEIGHTS,
    Kind,
    choice,
    convert,
    number,
    or_null,
    suggest,
    whole,
)

ALL_KINDS = [
    COLUMN,
    DEVICE,
    HEADER,
    LABELS,
    PATH,
    PATHS,
    REPORTS,
    RESUME,
    SWITCH,
    WEIGHTS,
    choice("a", "off"),
    number(above=0),
    or_null(number(low=0, below=1)),
    or_null(SWITCH),
    whole(1, also=-1),
]


def typed(kind: Kind, *words: str) -> object:
    return convert(kind, kind.read(words))


def refusal(kind: Kind, value: object) -> str:
    with pytest.raises(ValueError) as caught:
        convert(kind, value)
    return str(caught.value)


@pytest.mark.parametrize("text", ["2e-5", "2E-05", ".00002", "+2e-5", "0.00002"])
def test_a_float_may_be_text_since_pyyaml_reads_2e_5_so(text: str) -> None:
    assert convert(number(above=0), text) == 2e-5
    assert typed(number(above=0), text) == 2e-5


@pytest.mark.parametrize(
    "value", ["nan", "inf", "-inf", float("nan"), float("inf"), "1_0", " 1", "", "٣", True, None, [], 10**400]
)
def test_a_number_is_finite_and_plain(value: object) -> None:
    assert refusal(number(), value).startswith("expected a number, found ")


def test_bounds_hold_at_their_edges() -> None:
    kind = number(above=0, high=1)
    assert convert(kind, 1) == 1.0 and isinstance(convert(kind, 1), float)
    for value in (0, 1.0000001, -1):
        assert "expected a number above 0 and at most 1, found" in refusal(kind, value)
    assert convert(number(low=0, below=1), 0.0) == 0.0
    assert "of at least 0 and below 1" in refusal(number(low=0, below=1), 1)


def test_whole_numbers_are_neither_text_nor_floats_nor_switches() -> None:
    kind = whole(1, also=-1)
    assert convert(kind, 3) == 3 and convert(kind, -1) == -1
    for value in ("3", 3.0, True, 0, -2, 2**31, None):
        assert refusal(kind, value).startswith("expected a whole number of at least 1, or -1, found ")
    assert typed(kind, "3") == 3 and typed(kind, "-1") == -1
    assert "'3.0'" in refusal(kind, kind.read(["3.0"]))
    assert refusal(whole(0, 9), 10) == "expected a whole number from 0 to 9, found 10"


def test_a_switch_is_bare_true_or_false() -> None:
    assert typed(SWITCH) is True and typed(SWITCH, "true") is True and typed(SWITCH, "False") is False
    assert refusal(SWITCH, SWITCH.read(["yes"])) == "expected true or false, found 'yes'"
    for value in ("true", 1, 0, None):
        assert refusal(SWITCH, value).startswith("expected true or false")
    assert typed(or_null(SWITCH), "null") is None and typed(or_null(SWITCH)) is True


def test_a_choice_takes_yamls_false_for_off_and_no() -> None:
    assert convert(choice("auto", "off"), False) == "off"
    assert convert(choice("no", "steps"), False) == "no"
    assert "found true" in refusal(choice("auto", "off"), True)
    assert "found false" in refusal(choice("linear", "cosine"), False)
    assert refusal(choice("a", "b"), "c") == "expected one of a, b, found 'c'"


def test_paths_are_one_or_several() -> None:
    assert convert(PATHS, "a.tsv") == ["a.tsv"] == typed(PATHS, "a.tsv")
    assert typed(PATHS, "a", "b") == ["a", "b"] and typed(PATHS, "null") is None
    assert convert(PATHS, Path("x/y")) == ["x/y"] and convert(PATH, Path("x/y")) == "x/y"
    for value in ([], "", [""], [None], ["a", 3], 3, ["a\0b"], [["a"]]):
        refusal(PATHS, value)


def test_empty_text_means_not_set_as_in_run_glue() -> None:
    assert convert(PATH, "") is None and typed(PATH, "") is None and typed(PATH, "null") is None


def test_labels_that_yaml_read_as_something_else_are_refused_with_quote_it() -> None:
    assert convert(LABELS, ["yes", "no"]) == ["yes", "no"] == typed(LABELS, "yes", "no")
    assert convert(LABELS, [0, 1]) == ["0", "1"]
    for value in (True, False, None, 1.0):
        assert "quote it" in refusal(LABELS, ["a", value])
    assert "more than once" in refusal(LABELS, [1, "1"])
    assert "at least two labels, found 'a'" in refusal(LABELS, ["a"])
    for value in ([], ["a"], "a", {}, ["a", " "], ["a", ["b"]]):
        refusal(LABELS, value)


def test_class_weights_by_word_and_by_mapping() -> None:
    assert typed(WEIGHTS, "balanced") == "balanced" and typed(WEIGHTS, "null") is None
    assert typed(WEIGHTS, "a=b=2", "c=5e-1") == {"a=b": 2.0, "c": 0.5}
    assert convert(WEIGHTS, {0: 1, "x": "2e-1"}) == {"0": 1.0, "x": 0.2}
    assert "quote it" in refusal(WEIGHTS, {True: 1})
    for weight in (0, 1e308, 1e-320, 1e7):  # a sum of losses so weighted is nothing that float32 holds
        assert "at least 1e-06 and at most 1e+06" in refusal(WEIGHTS, {"a": weight})
    for value in ({}, "even", 3, [1, 2], {"a": None}):
        refusal(WEIGHTS, value)


def test_columns_are_names_or_numbers() -> None:
    assert typed(COLUMN, "-1") == -1 and typed(COLUMN, "text") == "text" and typed(COLUMN, "auto") == "auto"
    assert convert(COLUMN, "3") == "3", "quoted in YAML a number is a header name"
    assert typed(or_null(COLUMN), "null") is None
    for value in (None, True, 1.5):
        assert "quote it" in refusal(COLUMN, value)
    for value in ("", [1], 10**20):
        refusal(COLUMN, value)


def test_resume_header_device_and_reports() -> None:
    assert typed(RESUME) == "auto" == typed(RESUME, "true") == convert(RESUME, True)
    assert typed(RESUME, "false") is False and typed(RESUME, "out/checkpoint-3") == "out/checkpoint-3"
    assert typed(HEADER, "auto") == "auto" and typed(HEADER, "false") is False
    assert typed(DEVICE, "cuda:1") == "cuda:1"
    assert convert(REPORTS, "none") == ["none"] == typed(REPORTS, "none")
    for kind, value in [
        (RESUME, None),
        (HEADER, "yes"),
        (DEVICE, "gpu"),
        (DEVICE, "cuda:"),
        (REPORTS, ["wandb"]),
    ]:
        refusal(kind, value)


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


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(ALL_KINDS), anything)
def test_any_value_is_accepted_for_good_or_refused_in_words(kind: Kind, value: object) -> None:
    try:
        accepted = convert(kind, value)
    except ValueError as error:
        assert str(error).startswith("expected ") and "\n" not in str(error)
    else:
        assert convert(kind, accepted) == accepted, "what was accepted once is accepted again, unchanged"
