"""The pictures: readable sizes, the same bytes each time, no warnings, no global state; PNG and SVG alike."""

import io
import logging
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from bertpair.evaluation.plots import (
    MAX_CLASSES,
    VARIABLES,
    draw_confusion,
    draw_curves,
    draw_reliability,
    largest_classes,
)

CHINESE = ["正确", "错误", "部分正确"]


def pixels(png: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG" and not image.text  # nothing but the picture: no version, no date
        return np.asarray(image.convert("RGB"))


def random_matrix(num_labels: int) -> NDArray[np.int64]:
    generator = np.random.default_rng(num_labels)
    errors = np.zeros((num_labels, num_labels), dtype=np.int64)
    where = generator.integers(
        0, num_labels, size=(2, 2 * num_labels)
    )  # few: each cell's text takes its time
    np.add.at(errors, tuple(where), generator.integers(1, 30, size=2 * num_labels))
    return errors + np.diag(generator.integers(100, 2000, size=num_labels))


def records(steps: int, every: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        shared = {"step": step, "epoch": step / steps}
        found.append({**shared, "loss": 1 / step, "lr": 1e-5})
        if step % every == 0:
            found.append({**shared, "eval_loss": 1.5 / step, "eval_acc": 1 - 1 / step})
    return found


@pytest.mark.slow
@pytest.mark.parametrize("num_labels", [2, 3, 12, 40])
def test_confusion_cells_are_large_enough_to_read(num_labels: int) -> None:
    labels = [f"class name {k}" for k in range(num_labels)]
    height, width, _ = pixels(draw_confusion(random_matrix(num_labels), labels)).shape
    assert min(height, width) > 50 * num_labels  # a count and a percentage in 6.5 points and more
    assert max(height, width) < 2900


@pytest.mark.slow
def test_cells_grow_with_the_counts() -> None:
    labels = [str(k) for k in range(20)]
    small = pixels(draw_confusion(random_matrix(20), labels))
    large = pixels(draw_confusion(random_matrix(20) * 10**7, labels))
    assert large.shape[0] > 1.3 * small.shape[0]


def test_the_shade_shows_right_and_wrong() -> None:
    image = pixels(draw_confusion([[5, 0], [5, 0]], ["a", "b"])).reshape(-1, 3).astype(int)
    for color in ((31, 95, 168), (217, 115, 13)):
        assert np.mean(np.abs(image - color).max(axis=1) <= 1) > 0.05


@pytest.mark.parametrize(
    ("matrix", "labels"),
    [
        ([[0, 0], [0, 0]], ["a", "b"]),
        ([[3, 1], [0, 0]], ["$\\frac{$", "_hidden"]),
        ([[3, 1], [0, 2]], ["a very long name " * 9, "\u200d\x07"]),
        (np.diag([1, 2, 3]), CHINESE),
        (np.diag([1, 2]), ["𠮷", "🙂"]),
    ],
)
def test_odd_matrices_and_names_are_drawn_without_a_word(
    matrix: Any, labels: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        assert pixels(draw_confusion(matrix, labels)).std() > 1
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.slow
def test_the_smallest_of_many_classes_are_drawn_as_one() -> None:
    matrix = random_matrix(3 * MAX_CLASSES)
    matrix[7] = matrix[:, 7] = 0
    condensed, kept = largest_classes(matrix)
    assert condensed.shape == (MAX_CLASSES + 1, MAX_CLASSES + 1) and condensed.sum() == matrix.sum()
    assert kept == sorted(kept) and len(kept) == MAX_CLASSES and 7 not in kept
    assert np.array_equal(condensed[:-1, :-1], matrix[np.ix_(kept, kept)])
    assert condensed[0, -1] == matrix[kept[0]].sum() - matrix[kept[0], kept].sum()
    pixels(draw_confusion(matrix, [f"名 {k}" for k in range(3 * MAX_CLASSES)]))


def test_the_same_input_gives_the_same_bytes() -> None:
    labels = ["negative", "neutral", "正确"]
    assert draw_confusion(random_matrix(3), labels) == draw_confusion(random_matrix(3), labels)
    assert draw_curves(records(50, 5), "acc") == draw_curves(records(50, 5), "acc")


def test_pictures_leave_global_state_alone() -> None:
    settings, level = dict(matplotlib.rcParams), logging.getLogger("matplotlib").level
    draw_confusion(random_matrix(3), CHINESE)
    draw_curves(records(20, 5), "acc")
    assert dict(matplotlib.rcParams) == settings
    assert logging.getLogger("matplotlib").level == level


@pytest.mark.parametrize(
    ("lines", "metric"),
    [
        (records(1, 1), "acc"),
        (records(6, 2), "acc"),
        (records(5000, 500), "acc"),
        (records(30, 40), "acc"),  # never evaluated
        (records(30, 10), "loss"),
        (records(30, 10), "pearson"),  # never measured
        (records(30, 10), None),
        ([{"step": 1, "loss": float("nan"), "lr": None}, {"step": 2, "loss": 1.0, "lr": 0.0}], "acc"),
        ([{"step": 0, "epoch": 0.0, "eval_loss": 1.0, "eval_acc": 0.25}], "acc"),
        ([], "acc"),
    ],
)
def test_curves_of_any_length_are_drawn(lines: list[dict[str, Any]], metric: str | None) -> None:
    assert pixels(draw_curves(lines, metric)).std() > 1


def test_a_panel_is_there_for_a_watched_metric_only() -> None:
    with_metric = pixels(draw_curves(records(30, 10), "acc"))
    without = pixels(draw_curves(records(30, 40), "acc"))
    assert with_metric.shape[0] > without.shape[0]


@pytest.mark.slow
def test_the_best_evaluation_is_marked_for_loss_at_its_least() -> None:
    lines = [{"step": k, "eval_loss": loss} for k, loss in enumerate([3.0, 1.0, 2.0])]
    moved = [{"step": k, "eval_loss": loss} for k, loss in enumerate([3.0, 2.0, 1.0])]
    both = pixels(draw_curves([{**line, "eval_acc": 1.0} for line in lines], "acc"))
    assert not np.array_equal(pixels(draw_curves(lines, "loss")), pixels(draw_curves(moved, "loss")))
    assert np.any(np.all(both == (43, 138, 87), axis=2))  # the watched metric's own colour


def bins(rows: Any) -> tuple[Any, Any, Any]:
    """Confidence, accuracy and rows of as many parts; NaN in those that are empty."""
    counts = np.asarray(rows)
    confidence = np.where(counts > 0, (np.arange(len(counts)) + 0.5) / len(counts), np.nan)
    return confidence, confidence**2, counts


def elements(svg: bytes) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(svg).iter())


def values(svg: bytes) -> str:
    """All attributes of a picture, in one text."""
    return " ".join(value for element in elements(svg) for value in element.attrib.values())


@pytest.mark.parametrize("as_svg", [False, True])
@pytest.mark.parametrize("rows", [[0] * 15, [0] * 14 + [9], [1234567] * 15, [3, 0, 5], range(15)])
def test_a_reliability_diagram_has_a_point_for_each_part_with_rows(rows: Any, as_svg: bool) -> None:
    drawn = draw_reliability(*bins(rows), as_svg=as_svg)
    assert drawn == draw_reliability(*bins(rows), as_svg=as_svg)
    if not as_svg:
        assert pixels(drawn).shape == (720, 600, 3)
        return
    markers = [each for each in elements(drawn) if each.tag == "use" and "--blue" in each.get("style", "")]
    num_filled = sum(count > 0 for count in rows)
    assert len(markers) == num_filled + 1  # and one in the legend
    texts = [element.text for element in elements(drawn) if element.tag == "text"]
    assert sum(word in texts for word in ("0", "nan")) == 0 and "accuracy = confidence" in texts


def test_points_stand_where_confidence_and_accuracy_say() -> None:
    drawn = elements(draw_reliability([0.25, 0.75], [0.5, 0.625], [1, 3], as_svg=True))
    diagonals = [each.attrib["d"] for each in drawn if "dasharray" in each.get("style", "")]
    left, bottom, right, top = map(float, re.findall(r"[\d.]+", diagonals[0]))
    markers = [each for each in drawn if each.tag == "use" and "--blue" in each.get("style", "")]
    places = [(float(each.attrib["x"]), float(each.attrib["y"])) for each in markers[:2]]
    found = [((x - left) / (right - left), (y - bottom) / (top - bottom)) for x, y in places]
    assert np.allclose(found, [(0.25, 0.5), (0.75, 0.625)], atol=1e-3)


def test_an_svg_has_ids_of_its_own_and_refers_to_nothing_else() -> None:
    pictures = [
        draw_curves(records(30, 10), "acc", as_svg=True),
        draw_curves(records(30, 5), "acc", as_svg=True),
        draw_reliability(*bins([1, 2, 3]), as_svg=True),
    ]
    all_ids: list[str] = []
    for picture in pictures:
        ids = [element.attrib["id"] for element in elements(picture) if "id" in element.attrib]
        referred = re.findall(r"url\(#([^)]+)\)", values(picture))
        referred += [e.attrib["href"].removeprefix("#") for e in elements(picture) if "href" in e.attrib]
        assert len(referred) > 10 and set(referred) <= set(ids)
        all_ids += ids
    assert len(set(all_ids)) == len(all_ids) > 100


def test_an_svg_is_one_element_whose_colours_and_font_a_page_may_set() -> None:
    assert draw_curves(records(50, 5), "acc", as_svg=True) == draw_curves(records(50, 5), "acc", as_svg=True)
    for picture in (
        draw_curves(records(500, 50), "acc", as_svg=True),
        draw_reliability(*bins([4]), as_svg=True),
    ):
        assert picture.startswith(b"<svg viewBox=") and b"http" not in picture and b"<style" not in picture
        assert b":" not in b"".join(re.findall(rb"<[^ >]+", picture))  # no namespace
        styles = " ".join(element.get("style", "") for element in elements(picture))
        used = set(re.findall(r"var\((--\w+), (#\w+)\)", styles))
        assert {(color, name) for name, color in used} <= set(VARIABLES.items())
        assert "#" not in re.sub(r"var\([^)]+\)", "", styles)
        assert "DejaVu" not in styles and "var(--font, sans-serif)" in styles


@pytest.mark.parametrize("label", ["</svg><script>&", "url(#a) #1f2933 'DejaVu Sans'", "正确🙂", "$x$"])
def test_texts_in_an_svg_are_as_they_were(label: str) -> None:
    lines = [{**line, "eval_f1": 0.5, "eval_positive_label": label} for line in records(9, 3)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        drawn = draw_curves(lines, "f1", as_svg=True)
    assert not caught
    assert f"f1 of {label}" in [element.text for element in elements(drawn)]


def test_characters_that_no_file_can_hold_are_replaced() -> None:
    lines = [{"step": 1, "eval_f1": 0.5, "eval_positive_label": "a\udcff\ufffe\x00b"}]
    drawn = draw_curves(lines, "f1", as_svg=True)
    assert "f1 of a\ufffd\ufffdb" in [element.text for element in elements(drawn)]
    assert pixels(draw_curves(lines, "f1")).std() > 1


@pytest.mark.slow
def test_a_home_that_cannot_be_written_prints_nothing(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.write_text("a file where matplotlib wants a folder")
    draw = "draw_confusion([[1, 0], [0, 1]], ['a', '对'])[:4]"
    program = f"from bertpair.evaluation.plots import draw_confusion; print({draw})"
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=Path(__file__).parents[2],
        env={"HOME": str(home), "PATH": "/usr/bin:/bin", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "b'\\x89PNG'\n", "")
