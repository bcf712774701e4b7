"""Numbers that a call is given: whole ones, finite ones, seeds."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor

from mm_adapters._errors import InputError

_SEEDS = (-(2**63), 2**64)  # What torch.Generator.manual_seed takes.


def check_whole(name: str, value: Any, least: int = 1) -> int:
    """The value as an int. Raises: InputError if it is no whole number, or below `least`."""
    number = _whole(value)
    if number is None or number < least:
        raise InputError(f"{name}={value!r}: pass a whole number from {least} up.")
    return number


def check_finite(name: str, value: Any) -> None:
    """Raises: InputError if it is no number, or NaN or infinite; of several, if one is. Tensors pass."""
    if isinstance(value, Tensor | np.ndarray) and np.ndim(value):
        return
    if isinstance(value, list | tuple):
        for i, one in enumerate(value):
            check_finite(f"{name}[{i}]", one)
        return
    if not isinstance(value, Real | np.number | np.ndarray | Tensor):
        raise InputError(f"{name}={value!r} is {type(value).__name__}. Pass a number.")
    if not math.isfinite(float(value)):
        raise InputError(f"{name}={float(value)}. Pass a finite number.")


def check_between(name: str, value: Any, low: float, high: float, *, above: bool = False) -> None:
    """Raises: InputError if it is outside low..high; `above`: `low` itself is outside too."""
    check_finite(name, value)
    number = float(value)
    if not (low < number <= high if above else low <= number <= high):
        raise InputError(
            f"{name}={value}: it is a share of the run, {'above' if above else 'from'} {low} to {high}."
        )


def check_seed(seed: Any) -> None:
    """Raises: InputError if it is neither a seed nor a sequence of seeds, one a picture."""
    many = isinstance(seed, Sequence | np.ndarray | Tensor) and not isinstance(seed, str | bytes)
    if many and np.ndim(seed) and not len(seed):
        raise InputError("seed is empty. Pass a whole number, or one for each picture.")
    for one in seed if many and np.ndim(seed) else [seed]:
        number = _whole(one)
        if number is None or not _SEEDS[0] <= number < _SEEDS[1]:
            raise InputError(
                f"seed={seed!r}: a seed is a whole number of at most 64 bits, or a list with one for "
                "each picture."
            )


def _whole(value: Any) -> int | None:
    if isinstance(value, bool | np.bool_):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None
