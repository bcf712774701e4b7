"""What self-contained pages are made of: pictures inside the page, files that appear whole."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable
from io import BytesIO
from pathlib import Path


def inline(save: Callable[[BytesIO], object]) -> str:
    """What `save` writes, a PNG, as the `src` of an image."""
    out = BytesIO()
    save(out)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def write_whole(path: Path, text: str) -> None:
    """A text file; a write that is cut short leaves what was there before."""
    part = path.with_name(f".part-{path.name}")
    part.write_text(text, "utf-8", newline="")
    os.replace(part, path)
