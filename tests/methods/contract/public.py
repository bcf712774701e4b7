"""The public methods that take a model, found by their signatures."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from typing import Any

import methods_multimodal


def rooms() -> Iterator[Any]:
    """The packages of `methods_multimodal`."""
    for module in pkgutil.iter_modules(methods_multimodal.__path__, "methods_multimodal."):
        if module.ispkg:
            yield importlib.import_module(module.name)


def methods() -> dict[str, Any]:
    """Each public function that takes a model, and each class which is made with one or whose methods do."""
    takers = {}
    for room in rooms():
        for name in getattr(room, "__all__", ()):
            if takes_a_model(getattr(room, name)):
                takers[f"{room.__name__.rpartition('.')[2]}.{name}"] = getattr(room, name)
    return takers


def takes_a_model(value: Any) -> bool:
    """Whether a function, the making of a class, or one of its public methods takes a model."""
    if inspect.isclass(value):
        own = [m for n, m in inspect.getmembers(value, inspect.isfunction) if not n.startswith("_")]
        return any(map(_takes, [value, *own]))
    return inspect.isfunction(value) and _takes(value)


def _takes(fn: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(fn).parameters.values()
    except ValueError:  # A class of builtins has no signature.
        return False
    return any(map(is_model, parameters))


def is_model(parameter: inspect.Parameter) -> bool:
    """Whether a parameter is a model: by its annotation, or by its name if that says nothing."""
    kind = str(parameter.annotation)
    if kind in ("Any", "typing.Any", str(inspect.Parameter.empty)):
        return parameter.name == "model"
    return re.search(r"\b(Hooked|Traced)?Model\b|\bLens\b", kind) is not None
