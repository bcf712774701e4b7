"""Files that appear whole: a write that is cut short leaves what was there before."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write to, in the same folder and with the same suffix; at the end it takes `path`'s place.

    After an exception nothing is left of it.
    """
    part = path.with_name(f".part-{path.name}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A text file in UTF-8, its line ends as they are."""
    with whole(path) as part:
        part.write_text(text, "utf-8", newline="")


def write_json(path: Path, value: Any) -> None:
    """Plain data as JSON."""
    write_text(path, json.dumps(value, indent=1))
