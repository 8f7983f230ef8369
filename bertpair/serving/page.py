"""The page at /: one file, its Content-Security-Policy made from the hashes of its own script and style."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from pathlib import Path

FILE = Path(__file__).with_name("page.html")
_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


class Page:
    """page.html, read once."""

    def __init__(self, text: str | None = None) -> None:
        self.text = FILE.read_text(encoding="utf-8") if text is None else text
        hashes: dict[str, list[str]] = {"script": [], "style": []}
        for kind, content in _INLINE.findall(self.text):
            digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
            hashes[kind].append(f"'sha256-{digest}'")
        self.policy = "; ".join(
            [
                "default-src 'none'",
                f"script-src {' '.join(hashes['script'])}",
                f"style-src {' '.join(hashes['style'])}",
                "connect-src 'self'",
                "img-src data:",
                "base-uri 'none'",
                "form-action 'none'",
                "frame-ancestors 'none'",
            ]
        )

    def render(self, root_path: str, *, keyed: bool) -> tuple[bytes, dict[str, str]]:
        """Body and headers; `root_path` is the prefix its requests go to, `keyed` shows the key's field."""
        body = self.text.replace("__ROOT__", html.escape(root_path, quote=True))
        body = body.replace("__KEYED__", "true" if keyed else "false")
        return body.encode(), {
            "Content-Type": "text/html; charset=utf-8",
            "Content-Security-Policy": self.policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        }
