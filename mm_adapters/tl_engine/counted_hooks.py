"""Hooks of `run_with_hooks` and names of `run_with_cache` that a run never came to."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from typing import Any

import torch

from mm_adapters._errors import InputError, ReadNeverFiredError

_CAUSE = (
    "The inputs may not use that part of the model, or a cache, a compiled or a fused module passes it over."
)


class CountedHooks:
    """The hooks of one run, which note that they were called. `hooks` are given to TransformerLens."""

    def __init__(self, fwd_hooks: Iterable[tuple[Any, Callable[..., Any]]]) -> None:
        self._names: list[Any] = []
        self._called: set[int] = set()
        for pair in fwd_hooks:
            if not (isinstance(pair, tuple | list) and len(pair) == 2 and callable(pair[1])):
                raise InputError(f"fwd_hooks holds {pair!r}. It takes pairs of a site's name and a function.")
        self.hooks = [(name, self._counted(name, hook)) for name, hook in fwd_hooks]

    def check(self) -> None:
        """Raises: ReadNeverFiredError if one was not called."""
        idle = [name for i, name in enumerate(self._names) if i not in self._called]
        if idle:
            shown = ", ".join("what a function names" if callable(name) else str(name) for name in idle)
            raise ReadNeverFiredError(f"The hook at {shown} was never called in this run. {_CAUSE}")

    def _counted(self, name: Any, hook: Callable[..., Any]) -> Callable[..., Any]:
        index = len(self._names)
        self._names.append(name)

        def counted(value: Any, *, hook: Any) -> Any:
            self._called.add(index)
            return plain(value, hook=hook)

        plain = hook
        return counted


def names_of(names_filter: Any) -> list[str]:
    """The names that a filter lists; of None or a function, none."""
    if names_filter is None or callable(names_filter):
        return []
    names = [names_filter] if isinstance(names_filter, str) else names_filter
    if not isinstance(names, Iterable) or not all(isinstance(name, str) for name in names):
        raise InputError(
            f"names_filter={names_filter!r}: it is a name, a list of names, or a function of one."
        )
    return list(names)


def check_device(device: Any) -> None:
    """Raises: InputError for a device that torch does not know."""
    try:
        torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"device={device!r}: {reason}") from None


def check_cached(names_filter: Any, values: Container[str], prefix: str = "") -> None:
    """Raises: ReadNeverFiredError if a name of a list has no value among these."""
    idle = [
        name
        for name in names_of(names_filter)
        if name not in values and f"{prefix}{name.removeprefix(prefix)}" not in values
    ]
    if idle:
        raise ReadNeverFiredError(f"{', '.join(idle)} had no value in this run. {_CAUSE}")
