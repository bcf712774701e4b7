"""How often an edit fired, and how far it moved its site."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mm_adapters._errors import InputError
from mm_adapters.runs.lens import Call, Edit, Receipt


class Meter:
    """Counts an edit's firings and measures how far it moves its site."""

    def __init__(self, edit: Edit) -> None:
        self.edit = edit
        self.fired = 0
        self._fn = with_call(edit.fn)
        self._change: Tensor | float = 0.0
        self._size: Tensor | float = 0.0

    def __call__(self, value: Tensor, call: Call) -> Tensor:
        """`edit.fn(value)`, counted.

        Raises: InputError if it is no tensor, or its shape changes, it is complex, or holds new NaNs.
        """
        # A copy, for an edit may write into what it is given: the change is measured against what was.
        given = value.clone()
        version = None if given.is_inference() else given._version
        new = self._fn(given, call)
        self._check(value, new)
        self.fired += 1
        if new is given and version is not None and given._version == version:
            self._measure(value, value)
            return value
        new = new.to(device=value.device, dtype=value.dtype)
        self._measure(value, new)
        return new

    def receipt(self) -> Receipt:
        """What the edit did."""
        change, size = float(self._change), float(self._size)
        moved = 0.0 if change == 0 else (change / size) ** 0.5 if size else float("inf")
        return Receipt(self.edit.site, self.fired, moved)

    def state(self) -> Tensor:
        """What it has counted and measured so far, exactly; `restore` takes it back."""
        return torch.tensor([self.fired, float(self._change), float(self._size)], dtype=torch.float64)

    def restore(self, state: Tensor) -> None:
        """Goes on from an earlier `state`."""
        self.fired = int(state[0])
        self._change, self._size = state[1].float(), state[2].float()

    def _check(self, value: Tensor, new: object) -> None:
        what = f"The edit at {self.edit.site} was given {tuple(value.shape)} and returned"
        if not isinstance(new, Tensor) or new.shape != value.shape:
            returned = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise InputError(f"{what} {returned}. An edit returns a tensor of the same shape.")
        if new.is_complex() and not value.is_complex():
            raise InputError(f"{what} complex numbers, and the model computes with {value.dtype}.")
        if new.is_floating_point() and bool((new.isnan() & ~value.to(new.device).isnan()).any()):
            raise InputError(f"{what} NaN where there was a number. Infinity may stand for what is masked.")

    def _measure(self, value: Tensor, new: Tensor) -> None:
        with torch.no_grad():
            was, now = (_masked_as_infinite(x.detach().float()) for x in (value, new))
            # Masked scores are -inf: one that stays so did not move, one that does not moved by one.
            change = torch.where(was == now, 0.0, (now - was).nan_to_num(1.0, 1.0, 1.0))
            self._change = self._change + change.square().sum()
            self._size = self._size + was.nan_to_num(0.0, 0.0, 0.0).square().sum()


def with_call(fn: Callable[..., Any]) -> Callable[[Tensor, Call], Any]:
    """The function of an edit or a reduce as one of a value and its call, whichever it takes."""
    try:
        takes_call = "call" in inspect.signature(fn).parameters
    except (TypeError, ValueError):  # Some of torch's own functions have no signature.
        takes_call = False
    return (lambda value, call: fn(value, call=call)) if takes_call else (lambda value, call: fn(value))


def _masked_as_infinite(scores: Tensor) -> Tensor:
    # Some models mask with the least number there is, whose square is not a number's size.
    return scores.masked_fill(scores < torch.finfo(torch.float16).min * 2, -torch.inf)
