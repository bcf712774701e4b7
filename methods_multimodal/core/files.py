"""Text and JSON files that appear whole: a write that is cut short leaves what was there before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mm_adapters.store import atomic_write


def write_text(path: Path, text: str) -> None:
    """A text file in UTF-8, its line ends as they are."""
    with atomic_write(path) as draft:
        draft.write_text(text, "utf-8", newline="")


def write_json(path: Path, value: Any) -> None:
    """Plain data as JSON."""
    write_text(path, json.dumps(value, indent=1))
