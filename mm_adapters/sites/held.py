"""A module's tensors where it computes with them, wherever they are held in between (offload)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def held(module: nn.Module, name: str) -> Any:
    """The attribute of this name; a tensor that is offloaded is fetched to where the module computes."""
    value = getattr(module, name, None)
    if not (isinstance(value, Tensor) and value.is_meta and "_hf_hook" in module.__dict__):
        return value
    from accelerate.utils import align_module_device

    with align_module_device(module):
        return getattr(module, name).detach().clone()


def place(modules: Iterable[nn.Module]) -> torch.device | None:
    """Where modules compute: the device of their first weight, or the one that it is fetched to."""
    for module in modules:
        first = next(module.parameters(), None)
        if first is None:
            continue
        return (_fetched_to(module) if first.is_meta else None) or first.device
    return None


def _fetched_to(module: nn.Module) -> torch.device | None:
    for part in module.modules():
        hook = part.__dict__.get("_hf_hook")
        for one in getattr(hook, "hooks", (hook,)):
            device = getattr(one, "execution_device", None)
            if device is not None and getattr(one, "offload", False):
                return torch.device(device)
    return None
