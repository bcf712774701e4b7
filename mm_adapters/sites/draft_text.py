"""Drafted lines as a file that a linter passes: what it imports first, and no line that is too long."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from mm_adapters import records

_LONGEST = 100


def as_file(lines: Sequence[str]) -> str:
    """The lines after an import of the words of `mm_adapters.records` that they use."""
    body = "\n".join(part for line in lines for part in _fitting(line))
    words = [name for name in sorted(records.__all__) if re.search(rf"\b{name}\(", body)]
    line = f"from mm_adapters.records import {', '.join(words)}"
    if len(line) > _LONGEST:
        line = "\n".join(["from mm_adapters.records import (", *(f"    {w}," for w in words), ")"])
    return f"{line}\n\n{body}"


def _fitting(line: str) -> Iterator[str]:
    """A line, or what it is in several: its comment above it, its call's arguments below."""
    code, _, comment = line.partition("  # ")
    indent = line[: len(line) - len(line.lstrip())]
    if len(line) > _LONGEST and comment and code.strip():
        yield f"{indent}# {comment}"
        line = code
    call = re.fullmatch(r"(\W*\w+\()(.*)(\)\W*)", line)
    if len(line) <= _LONGEST or call is None:
        yield line
        return
    yield call[1]
    row = f"{indent}    "
    for argument in call[2].split(", "):
        if len(row) + len(argument) > _LONGEST and row.strip():
            yield row.rstrip()
            row = f"{indent}    "
        row += f"{argument}, "
    yield row.rstrip()
    yield f"{indent}{call[3]}"
