"""Which font draws a text: never one that lacks a glyph."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.font_manager import fontManager

from bertpair.evaluation.plots import draw_confusion, find_fonts, printable

# From a private use area, so that no font of the machine that runs this can have them.
STRANGE = "\ue7f3\ue7f4"


def build_font(path: Path, family: str, characters: str) -> None:
    """A font whose glyphs, all alike, are filled squares."""
    names = [".notdef", *(f"u{ord(c):04x}" for c in characters)]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(c): name for c, name in zip(characters, names[1:], strict=True)})
    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    for point in ((100, 800), (900, 800), (900, 0)):
        pen.lineTo(point)
    pen.closePath()
    builder.setupGlyf(dict.fromkeys(names, pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 100)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": family, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)


@pytest.fixture
def strange_font(tmp_path: Path) -> Iterator[str]:
    """An installed font that has the strange characters, and two that only seem to."""
    before = list(fontManager.ttflist)
    for family, characters in (("Adobe Blank 2", STRANGE), ("Half", STRANGE[0]), ("Whole", STRANGE + "ab ")):
        build_font(tmp_path / f"{family}.ttf", family, characters)
        fontManager.addfont(tmp_path / f"{family}.ttf")
    yield str(tmp_path / "Whole.ttf")
    fontManager.ttflist[:] = before


@pytest.mark.usefixtures("strange_font")
def test_the_fonts_that_a_text_needs_are_found() -> None:
    assert find_fonts("plain вполне")[1] == set() == find_fonts("")[1]
    families, missing = find_fonts("a" + STRANGE + "\ue7f5")
    assert families[0] == "DejaVu Sans" and families[-1] == "Whole" and missing == {"\ue7f5"}
    assert "Adobe Blank 2" not in families


def test_without_a_font_the_characters_are_named() -> None:
    assert find_fonts("a" + STRANGE)[1] == set(STRANGE)


def test_a_damaged_font_is_passed_over(strange_font: str, tmp_path: Path) -> None:
    (tmp_path / "Half.ttf").write_bytes(b"no font")
    Path(strange_font).unlink()
    assert find_fonts(STRANGE)[1] == set(STRANGE)


def test_a_name_is_drawn_where_a_font_has_it(strange_font: str) -> None:
    drawn = draw_confusion(np.eye(2, dtype=int), [STRANGE, "b"])
    fontManager.ttflist[:] = [entry for entry in fontManager.ttflist if entry.fname != strange_font]
    assert drawn != draw_confusion(np.eye(2, dtype=int), [STRANGE, "b"])  # now `class 0`, and a note


def test_printable_text_has_no_invisible_characters_and_an_end() -> None:
    assert printable("a\tb\u200d\u202ec\n", 10) == "abc"
    assert printable("正" * 30, 28) == "正" * 27 + "…"
