"""Which texts say nothing: those of white space, control and other characters that nobody can see.

`INVISIBLE` holds the categories Cc, Cf, Zs, Zl and Zp, what Unicode calls default-ignorable (variation
selectors, Hangul fillers and the like), and the empty Braille cell. It is a literal because /openapi.json
shows it, and must not change with Python's Unicode tables.
"""

from __future__ import annotations

import re

INVISIBLE = (
    r"\u0000-\u0020\u007f-\u00a0\u00ad\u034f\u0600-\u0605\u061c\u06dd\u070f\u0890-\u0891\u08e2\u115f-\u1160\u1680"
    r"\u17b4-\u17b5\u180b-\u180f\u2000-\u200f\u2028-\u202f\u205f-\u206f\u2800\u3000\u3164\ufe00-\ufe0f\ufeff"
    r"\uffa0\ufff0-\ufffb"
    "\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
_VISIBLE = re.compile(f"[^{INVISIBLE}]")
_HIDDEN = re.compile(f"[{INVISIBLE}]+")


def without_invisible(text: str) -> str:
    """What can be seen of it."""
    return _HIDDEN.sub("", text)


def is_blank(text: str) -> bool:
    """Whether there is nothing to see in it."""
    return _VISIBLE.search(text) is None
