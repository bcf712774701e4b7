"""Self-contained pages: templates that escape what they are given, and pictures inside the page."""

from __future__ import annotations

import base64
from collections.abc import Callable
from functools import cache
from io import BytesIO
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render(template: str, **values: Any) -> str:
    """A page by one of `templates/`. Every value is escaped: none is markup."""
    return _environment().get_template(template).render(values)


def inline(save: Callable[[BytesIO], object]) -> str:
    """What `save` writes, a PNG, as the `src` of an image."""
    out = BytesIO()
    save(out)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("methods_multimodal.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
