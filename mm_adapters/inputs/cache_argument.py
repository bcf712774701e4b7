"""The argument by which a model takes a key-value cache.

It is `past_key_values`; from transformers 5.24 on `cache`, and the old name is still taken from a caller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

NEW, OLD = "cache", "past_key_values"


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """The cache among a call's arguments, or None."""
    return next((arguments[name] for name in (NEW, OLD) if arguments.get(name) is not None), None)


def cache_name(takes: Callable[[str], bool]) -> str | None:
    """What a call names it; None if it takes none. `takes` tells whether it takes a name."""
    return next((name for name in (NEW, OLD) if takes(name)), None)
