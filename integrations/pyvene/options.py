"""Options that would be ignored are errors: pyvene's classes take any keyword and use a few."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from mm_adapters import InputError

_RENAMED = {"half": "rows"}


def check_options(kind: type, options: Mapping[str, Any], known: Sequence[str] | None = None) -> None:
    """Raises: InputError for an option that is not `known` (None: that no constructor of the class reads)."""
    known = options_of(kind) if known is None else known
    for name in options:
        if name in known:
            continue
        near = [_RENAMED[name]] if _RENAMED.get(name) in known else difflib.get_close_matches(name, known, 1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise InputError(
            f"{kind.__name__} has no option {name!r}. {hint}It has {', '.join(known) or 'no options'}."
        )


def options_of(kind: type) -> list[str]:
    """The names that the constructors of a class take, or look up in their keywords."""
    names: set[str] = set()
    for base in kind.__mro__:
        code = getattr(vars(base).get("__init__"), "__code__", None)
        if code is None or base.__module__.startswith("torch."):
            continue
        names |= set(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
        # kwargs["embed_dim"]: the name is one of the function's constants.
        names |= {value for value in code.co_consts if isinstance(value, str) and value.isidentifier()}
    return sorted(names - {"self", "interchange_dim"})
