"""Where a library puts the weights that it reads: on one device, or over several, the memory and the disk."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from mm_adapters._errors import InputError

_STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")


def check_device(device: str | torch.device | int) -> torch.device:
    """The device of this name. Raises: InputError if this machine has none."""
    try:
        checked = torch.device(device)
        torch.empty(0, device=checked)  # A device of a kind that torch knows may not be on this machine.
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].split(". ")[0]
        raise InputError(f"There is no device {str(device)!r} here: {reason}. Pass device='cpu'.") from None
    return checked


def default_device() -> torch.device:
    """The first GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def computes_on(device: Any, device_map: Any) -> torch.device:
    """Where a model is to compute: its device, or the first of its map that is no store of weights.

    Raises: InputError if there is no such device, if both are given, or for a map that is none.
    """
    if device_map is None:
        return default_device() if device is None else check_device(device)
    if device is not None:
        raise InputError(
            f"device={str(device)!r} and device_map={device_map!r} both say where the weights go. Leave one "
            "out."
        )
    if isinstance(device_map, str) and device_map in _STRATEGIES:
        return default_device()
    if not isinstance(device_map, Mapping):
        devices = [_place(device_map, of_map=False)]
    elif not device_map:
        raise InputError("device_map={} places no module. The whole model is '': device_map={'': 'cpu'}.")
    else:
        devices = [_place(where, of_map=True) for where in device_map.values()]
    if any(device is not None and device.type == "meta" for device in devices):
        raise InputError("On the meta device no weights are read: pass device='meta', and no device_map.")
    return next((d for d in devices if d is not None and d.type != "cpu"), torch.device("cpu"))


def check_map(device_map: Any, names: Callable[[], Iterable[str]]) -> None:
    """Raises: InputError if a map names a module that the model does not have.

    `names` are those of its modules and weights.
    """
    if not isinstance(device_map, Mapping):
        return
    known = [*names()]
    there = {*known, ""}
    for name in device_map:
        if name not in there:
            near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
            hint = f" The nearest are {', '.join(near)}." if near else ""
            raise InputError(
                f"device_map places {name!r}, and the model has no such module.{hint} The whole model is ''."
            )


def names_in(module: nn.Module) -> list[str]:
    """The names of a model's modules and weights."""
    return [name for name, _ in (*module.named_modules(), *module.named_parameters()) if name]


def is_placed(model: Any) -> bool:
    """Whether the library placed or packed the weights, so that they stay as they are."""
    return bool(getattr(model, "hf_device_map", None)) or getattr(model, "hf_quantizer", None) is not None


def _place(where: Any, *, of_map: bool) -> torch.device | None:
    """A device, or None for the disk. Raises: InputError if it is neither."""
    if of_map and where == "disk":
        return None
    if isinstance(where, bool) or not isinstance(where, str | int | torch.device):
        raise InputError(
            f"device_map={where!r} is no place: it is {', '.join(map(repr, _STRATEGIES))}, a device, or a "
            "dictionary of the model's modules with a device (or 'disk') each."
        )
    return check_device(where)
