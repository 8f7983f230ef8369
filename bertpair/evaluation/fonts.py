"""Fonts for text of any script: which installed font draws it, and how wide it comes out.

Fonts are named by file, so that neither the user's matplotlibrc nor a family of the same name changes a
picture. A font counts only if it has every glyph: a missing one would be drawn as a box, with a warning.
"""

import logging
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.font_manager import FontProperties

# Tried first where DejaVu lacks a glyph: they draw Chinese, Japanese and Korean well.
CJK_FONTS = ("Noto Sans CJK", "Source Han Sans", "PingFang", "Microsoft YaHei", "WenQuanYi")
# They have a glyph for every character, but it is a box or a blank.
PLACEHOLDER_FONTS = ("Last Resort", "LastResort", "Adobe Blank")


def printable(text: str, max_length: int) -> str:
    """The text without control and joining characters, which no font draws, cut where it is longer."""
    text = "".join(c for c in text if unicodedata.category(c) not in ("Cc", "Cf"))
    return text if len(text) <= max_length else text[: max_length - 1] + "…"


def find_fonts(texts: Iterable[str]) -> dict[str, str]:
    """The file of the first font that has all glyphs of a text; texts that no font can draw are left out."""
    from matplotlib.ft2font import FT2Font

    missing = set(texts) - {""}
    found: dict[str, str] = {}
    for path in _font_files():
        if not missing:
            break
        try:
            glyph = FT2Font(path).get_char_index
        except (OSError, RuntimeError):  # removed or damaged since matplotlib made its list
            continue
        drawn = {text for text in missing if all(glyph(ord(c)) for c in text)}
        found.update(dict.fromkeys(drawn, path))
        missing -= drawn
    return found


def font_of_size(size: float, path: str | None = None) -> "FontProperties":
    """The font in this file; None: DejaVu Sans, which matplotlib brings along."""
    from matplotlib.font_manager import FontProperties

    return FontProperties(fname=path or _own_font(), size=size)


def text_inches(text: str, font: "FontProperties") -> float:
    """The width of a line of text."""
    from matplotlib.textpath import text_to_path

    return float(text_to_path.get_text_width_height_descent(text, font, False)[0]) / 72


@contextmanager
def quiet_matplotlib() -> Iterator[None]:
    """Without matplotlib's log lines about a cache folder it cannot write and a font list it has to make."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _own_font() -> str:
    import matplotlib

    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))


def _font_files() -> Iterator[str]:
    """DejaVu first, then what is installed: good CJK fonts, upright and regular ones before the others."""
    from matplotlib.font_manager import fontManager

    yield _own_font()
    for entry in sorted(fontManager.ttflist, key=_preference):
        if not entry.name.startswith(PLACEHOLDER_FONTS):
            yield entry.fname


def _preference(entry: Any) -> tuple[bool, bool, bool, str, str]:
    is_regular = entry.weight in (400, "normal", "regular")
    return (
        not entry.name.startswith(CJK_FONTS),
        entry.style != "normal",
        not is_regular,
        entry.name,
        entry.fname,
    )
