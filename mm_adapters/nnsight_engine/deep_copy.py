"""Modules copied without the forwards that nnsight gave them."""

from __future__ import annotations

import copy
from typing import Any

from nnsight.intervention.source import STATE, Controller
from torch import nn

_OF_NNSIGHT = (STATE, "forward")


def without_controllers(module: nn.Module, wrapped: Any, memo: dict[int, Any]) -> Any:
    """A deep copy of `wrapped`, whose modules are in `module`, with their classes' own forwards.

    nnsight 0.8.1 (intervention/source.py) puts a forward on each module, which belongs to one model.
    """
    taken: list[tuple[nn.Module, dict[str, Any]]] = []
    try:
        for part in module.modules():
            if isinstance(part.__dict__.get("forward"), Controller):
                taken.append((part, {name: part.__dict__.pop(name) for name in _OF_NNSIGHT}))
        return copy.deepcopy(wrapped, memo)
    finally:
        for part, own in taken:
            part.__dict__.update(own)
