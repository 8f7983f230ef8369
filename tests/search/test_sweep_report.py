"""What came out of a sweep: the order of its trials, the table, the TSV and the picture."""

import io
import itertools
import math
import statistics
from collections.abc import Callable
from typing import Any

import matplotlib.image
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bertpair.search import report
from bertpair.search.report import Trial, draw_sweep, ranked, shown_params, spread, sweep_table, sweep_tsv
from bertpair.search.space import Dimension, Params

RATE = Dimension("learning_rate", low=1e-5, high=5e-5, kind="log")


def trial(number: int, *figures: float, status: str = "done", **settings: Any) -> Trial:
    mean = statistics.fmean(figures) if figures else None
    deviation = statistics.stdev(figures) if len(figures) > 1 else None
    by_seed = dict(enumerate(figures, 42))
    return Trial(number, settings, by_seed, mean, deviation, 12.34, "host-1", status)


def some(space: list[Dimension], count: int = 6, seeds: int = 3) -> list[Trial]:
    """Trials that take each setting's values in turn, best first."""
    made = []
    for k in range(count):
        settings: Params = {each.name: each.edges[k % len(each.edges)] for each in space}
        made.append(trial(k, *(0.9 - 0.02 * k - 0.003 * seed for seed in range(seeds)), **settings))
    return made


def test_best_first() -> None:
    trials = [
        trial(0, 0.5),
        trial(1, 0.7),
        trial(2, status="failed: too many steps"),
        trial(3, 0.9, 0.9, status="stopped early"),
        trial(4, 0.7),  # the same as 1
        trial(6, 0.6, 0.8),
        trial(7, status="failed: the disk is full"),
        trial(8, 0.95, 0.95, status="stopped early"),
    ]
    assert [each.number for each in ranked(trials, "acc")] == [1, 4, 6, 0, 8, 3, 2, 7]
    assert [each.number for each in ranked(trials, "loss")] == [0, 1, 4, 6, 3, 8, 2, 7]
    assert ranked([], "acc") == []


def test_values_in_words() -> None:
    assert spread(None, None) == "-" and spread(0.87654, None) == "0.8765"
    assert spread(0.87654, 0.0123) == "0.8765 ± 0.0123"
    params = {"learning_rate": 2e-5, "class_weights": {"a": 1.0, "b": 2.5}, "labels": ["a", "b"]}
    params |= {"group_by_length": True, "max_train_samples": None}
    assert shown_params(params) == (
        "learning_rate 2e-5, class_weights a=1 b=2.5, labels a b, group_by_length true, "
        "max_train_samples null"
    )


def test_the_table() -> None:
    trials = [
        trial(3, 0.9, 0.8, weight_decay=0.01, lr_scheduler_type="cosine"),
        trial(0, 0.5, weight_decay=0.0, lr_scheduler_type="linear"),
    ]
    lines = sweep_table(trials, "acc", [42, 43]).splitlines()
    assert lines[0].split() == (
        "weight_decay lr_scheduler_type acc, mean ± std seed 42 seed 43 seconds host".split()
    )
    assert lines[1].split() == "0.01 cosine 0.8500 ± 0.0707 0.9000 0.8000 12 host-1".split()
    assert lines[2].split() == "0 linear 0.5000 0.5000 - 12 host-1".split()
    failed = trial(1, weight_decay=1.0, lr_scheduler_type="cosine", status="failed: too many steps")
    lines = sweep_table([*trials, failed], "acc", [42, 43]).splitlines()
    assert lines[0].endswith("status") and lines[1].endswith("done")
    assert lines[3].split() == "1 cosine - - - 12 host-1 failed: too many steps".split()
    assert len(sweep_table([], "acc", [42]).splitlines()) == 1


def test_the_tsv_has_all_digits_and_a_line_for_each_trial() -> None:
    rate = 1.2345678901234567e-05
    trials = [
        trial(7, 0.1 + 0.2, 1 / 3, learning_rate=rate, positive_label="a\tb\nc\rd"),
        trial(12, math.nan, learning_rate=1e-5, positive_label="中文", status="stopped early"),
        trial(0, learning_rate=0.1, positive_label="x", status="failed: a\tb"),
    ]
    content = sweep_tsv(trials, "acc", [42, 43])
    assert content.endswith(b"\n") and b"\r" not in content
    head, *rows = [line.split("\t") for line in content.decode().removesuffix("\n").split("\n")]
    assert head == [
        *("trial", "learning_rate", "positive_label", "acc_mean", "acc_std", "seed_42", "seed_43"),
        *("seconds", "host", "status"),
    ]
    assert all(len(row) == len(head) for row in rows)
    first = dict(zip(head, rows[0], strict=True))
    assert first["trial"] == "007" and float(first["learning_rate"]) == rate
    assert first["positive_label"] == r"a\tb\nc\rd"
    assert float(first["seed_42"]) == 0.1 + 0.2 and float(first["seed_43"]) == 1 / 3
    assert float(first["acc_mean"]) == trials[0].mean and float(first["acc_std"]) == trials[0].deviation
    assert rows[1] == ["012", "1e-05", "中文", "nan", "", "nan", "", "12.3", "host-1", "stopped early"]
    assert rows[2] == ["000", "0.1", "x", "", "", "", "", "12.3", "host-1", r"failed: a\tb"]
    assert len(sweep_tsv([], "acc", [42]).splitlines()) == 1


# The picture


@pytest.mark.slow
@pytest.mark.parametrize("count", [0, 7])
def test_the_picture_is_a_png_and_the_same_again(count: int) -> None:
    words = Dimension("positive_label", ("linear", "中文", "a $x$", "tab\tbed", "\U0010fffd", None))
    space = [RATE, words, Dimension("weight_decay", (0.0, 1e-4, 1e-3))]
    picture = draw_sweep(some(space, count), "acc", space)
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and picture == draw_sweep(
        some(space, count), "acc", space
    )
    height, width, _ = matplotlib.image.imread(io.BytesIO(picture)).shape
    assert width > 3 * height


@pytest.fixture
def panels(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Axes]]:
    """panels(trials, space) -> the drawn panels, without the PNG of them."""
    drawn: list[Figure] = []

    def keep(figure: Figure) -> bytes:
        drawn.append(figure)
        return b""

    def draw(trials: list[Trial], space: list[Dimension]) -> list[Axes]:
        assert draw_sweep(trials, "acc", space) == b""
        return [axes for axes in drawn[-1].axes if axes.get_visible()]

    monkeypatch.setattr(report, "png", keep)
    return draw


def ticks(axes: Axes) -> list[str]:
    low, high = axes.get_xlim()
    names = zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
    return [label.get_text() for at, label in names if low <= at <= high]


@pytest.mark.parametrize(
    ("dimension", "scale", "names"),
    [
        (RATE, "log", ["1e-5", "2e-5", "3e-5", "4e-5", "5e-5"]),
        (
            Dimension("a", low=1e-5, high=2e-4, kind="log"),
            "log",
            ["1e-5", "2e-5", "5e-5", "0.0001", "0.0002"],
        ),
        (Dimension("a", low=1e-6, high=1e-2, kind="log"), "log", ["1e-6", "1e-5", "0.0001", "0.001", "0.01"]),
        (Dimension("a", low=1.1e-5, high=1.3e-5, kind="log"), "log", ["1.1e-5", "1.3e-5"]),
        (Dimension("a", (1e-2, 1e-4, 1e-3)), "log", ["0.0001", "0.001", "0.01"]),
        (Dimension("a", (0.0, 1e-4, 1e-3, 1e-2)), "symlog", ["0", "0.0001", "0.001", "0.01"]),
        (Dimension("a", (1000, 0, 10, 100)), "symlog", ["0", "10", "100", "1000"]),
        (
            Dimension("a", (0.0, *(1e-5 * 2**k for k in range(10)))),
            "symlog",
            ["0", "1e-5", "0.0001", "0.001"],
        ),
        (Dimension("a", (2e-5, 3e-5, 5e-5)), "linear", ["2e-5", "3e-5", "5e-5"]),
        (Dimension("a", (-1, 10, 1000)), "linear", ["-1", "10", "1000"]),
        (Dimension("a", (0.0, 0.1)), "linear", ["0", "0.1"]),
        (Dimension("a", (0,)), "linear", ["0"]),
        (Dimension("a", (None, 100, 10_000)), "linear", ["null", "100", "10000"]),
        (Dimension("a", (True, False)), "linear", ["true", "false"]),
        (Dimension("a", ("auto", 3, "3", None)), "linear", ["auto", "3", "3", "null"]),
        (Dimension("a", ("balanced", {"x": 1.0, "y": 2.0})), "linear", ["balanced", "x=1 y=2"]),
        (Dimension("a", (["x", "y"], ["y", "x"])), "linear", ["x y", "y x"]),
        (
            Dimension("a", ("google-bert/bert-base-multilingual-cased", "b")),
            "linear",
            ["…-multilingual-cased", "b"],
        ),
        (Dimension("a", ("\U0010fffd", "b")), "linear", ["value 1", "b"]),
    ],
)
@pytest.mark.parametrize("count", [0, 1, 6])
def test_the_axis_of_a_setting(
    panels: Callable[..., list[Axes]], dimension: Dimension, scale: str, names: list[str], count: int
) -> None:
    (axes,) = panels(some([dimension], count), [dimension])
    assert axes.get_title(loc="left") == dimension.name
    assert axes.get_xscale() == scale and ticks(axes) == names
    assert axes.get_xticks(minor=True).size == 0
    (dots, *_), low_high = axes.containers[0].lines[:1], axes.get_xlim()
    assert len(dots.get_xdata()) == count
    assert all(low_high[0] < float(at) < low_high[1] for at in dots.get_xdata())
    assert any("no trial" in text.get_text() for text in axes.texts) == (count == 0)


def test_ranges_of_numbers_that_are_not_log(panels: Callable[..., list[Axes]]) -> None:
    space = [
        Dimension("warmup_ratio", low=0.0, high=0.2, kind="range"),
        Dimension("max_steps", low=1, high=3, kind="int"),
    ]
    ratio, steps = panels(some(space), space)
    assert ratio.get_xscale() == steps.get_xscale() == "linear"
    assert all(float(at).is_integer() for at in steps.get_xticks())
    assert ratio.get_xlim()[0] < 0 < 0.2 < ratio.get_xlim()[1]


def test_what_is_drawn_of_a_trial(panels: Callable[..., list[Axes]]) -> None:
    space = [Dimension("weight_decay", (0.1, 0.2, 0.3))]
    odd = [
        trial(8, 0.99, 0.99, status="stopped early", weight_decay=0.3),
        trial(10, status="failed: x", weight_decay=0.3),
    ]
    (axes,) = panels([*some(space, 2), *odd], space)
    dots = axes.containers[0].lines[0]
    assert dots.get_xdata().tolist() == [0.1, 0.2]
    assert dots.get_ydata().tolist() == [each.mean for each in some(space, 2)]
    stars = [line for line in axes.lines if line.get_marker() == "*"]
    assert [line.get_xydata().tolist() for line in stars] == [[[0.1, some(space, 1)[0].mean]]]
    small = [line for line in axes.lines if line.get_marker() == "."]
    assert [len(line.get_xdata()) for line in small] == [3, 3]
    (axes,) = panels(some(space, 2, seeds=1), space)  # no deviation
    assert axes.containers[0].lines[0].get_ydata().tolist() == [0.9, 0.88]


@pytest.mark.parametrize(("count", "drawn", "columns"), [(1, 1, 1), (2, 2, 2), (4, 4, 3), (14, 12, 3)])
def test_a_panel_for_each_of_twelve_settings(
    panels: Callable[..., list[Axes]], count: int, drawn: int, columns: int
) -> None:
    space = [Dimension(f"setting_{k}", (0.1, 0.2, 0.3)) for k in range(count)]
    found = panels(some(space), space)
    assert [axes.get_title(loc="left") for axes in found] == [f"setting_{k}" for k in range(drawn)]
    assert sum(bool(axes.get_ylabel()) for axes in found) == -(-drawn // columns)
    note = found[0].figure.get_supxlabel()
    assert note == ("settings that are not shown: 2" if count == 14 else "")


@pytest.mark.slow
@pytest.mark.parametrize(
    "dimension",
    [
        RATE,
        Dimension("a", low=1e-12, high=0.1, kind="log"),
        Dimension("a", (0.9, 0.99, 0.999)),
        Dimension("a", (1, 2, 100)),
        Dimension("a", ("linear", "cosine", "constant", "constant_with_warmup")),
        Dimension("a", tuple(f"label {k}" for k in range(14))),
        Dimension("a", tuple(f"label {k}" for k in range(30))),
    ],
)
def test_names_on_an_axis_do_not_overlap(panels: Callable[..., list[Axes]], dimension: Dimension) -> None:
    space = [dimension, RATE, RATE]
    axes = panels(some(space), space)[0]
    axes.figure.draw_without_rendering()
    low, high = axes.get_xlim()
    labels = [
        each for at, each in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True) if low <= at <= high
    ]
    is_tilted = labels[0].get_rotation() != 0
    boxes = [each.get_window_extent() for each in labels]
    for left, right in itertools.pairwise(boxes):
        if is_tilted:  # each ends at its tick: a line's height beside the next
            assert (right.x1 - left.x1) * math.sin(math.radians(40)) > labels[0].get_fontsize() * 120 / 72
        else:
            assert right.x0 > left.x1
