"""Nothing on a built page is fetched: scripts, styles, fonts and pictures are files beside it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sphinx.errors import ExtensionError

_FETCHED = re.compile(
    r"""<(?:script|img|iframe|source|video|audio)\b[^>]*\bsrc\s*=\s*["']?(?:https?:)?//[^"'>\s]+"""
    r"""|<link\b(?=[^>]*\brel\s*=\s*["']?(?:stylesheet|preload|modulepreload|icon|preconnect))"""
    r"""[^>]*\bhref\s*=\s*["']?(?:https?:)?//[^"'>\s]+"""
    r"""|(?:@import\s+|url\(\s*)["']?(?:https?:)?//[^"')\s]+"""
)


def fetched(text: str) -> list[str]:
    """What a page or a style sheet would fetch from the network."""
    return _FETCHED.findall(text)


def check(app: Any, exception: Exception | None) -> None:
    """Raises: ExtensionError naming the pages that would fetch something."""
    if exception is not None or app.builder.format != "html":
        return
    wrong = [
        f"{path.relative_to(app.outdir)}: {', '.join(found[:3])}"
        for pattern in ("*.html", "*.css")
        for path in sorted(Path(app.outdir).rglob(pattern))
        if (found := fetched(path.read_text(encoding="utf-8", errors="replace")))
    ]
    if wrong:
        raise ExtensionError("These pages would fetch from the network:\n" + "\n".join(wrong))


def setup(app: Any) -> dict[str, Any]:
    app.connect("build-finished", check)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
