"""Docstrings as this project writes them, for autodoc: single backticks are code, `Source:` is prose."""

from __future__ import annotations

import re
from typing import Any

_CODE = re.compile(r"(`[^`\n]+`)")
_SECTION = re.compile(r"^(Args|Attributes|Raises|Returns|Yields):$")
_PARAGRAPH = re.compile(r"^(Source|Raises|Returns):(?= )")


def plain(line: str) -> str:
    """One line with its code in double backticks, and nothing else that is markup."""
    parts = _CODE.split(line)
    for i, part in enumerate(parts):
        if _CODE.fullmatch(part):
            parts[i] = f"`{part}`"
        else:
            # Code ends before a letter, as in `site`s, only where an escaped space says so.
            parts[i] = re.sub(r"([*|\\]|(?<=\w)_(?!\w))", r"\\\1", part)
            if i and part[:1].isalnum():
                parts[i] = f"\\ {parts[i]}"
    return "".join(parts)


def as_rest(lines: list[str]) -> list[str]:
    """The lines as reStructuredText. Indented lines are code, but below `Args:` and its like."""
    out: list[str] = []
    in_section = in_code = False
    for line in lines:
        indented = line.startswith("    ")
        if line.strip() and not indented:
            in_section = bool(_SECTION.match(line))
        if indented and not in_section:
            if not in_code:
                out += ["", "::", ""]
            in_code = True
            out.append(line)
            continue
        if in_code and line.strip():
            out.append("")
            in_code = False
        starts = _PARAGRAPH.match(line)
        if starts and out and out[-1].strip():
            out.append("")
        out.append(_PARAGRAPH.sub(r"**\1:**", plain(line)) if starts else plain(line))
    return out


def process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = as_rest(lines)


def setup(app: Any) -> dict[str, Any]:
    # Before napoleon, which reads sections of Google's style where a docstring has them.
    app.connect("autodoc-process-docstring", process, priority=100)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
