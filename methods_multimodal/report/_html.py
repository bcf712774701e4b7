"""What self-contained pages are made of: pictures inside the page."""

from __future__ import annotations

import base64
from collections.abc import Callable
from io import BytesIO


def inline(save: Callable[[BytesIO], object]) -> str:
    """What `save` writes, a PNG, as the `src` of an image."""
    out = BytesIO()
    save(out)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()

