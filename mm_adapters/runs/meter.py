"""How often an edit fired, and how far it moved its site."""

from __future__ import annotations

import torch
from torch import Tensor

from mm_adapters.runs.lens import Edit, Receipt


class Meter:
    """Counts an edit's firings and measures how far it moves its site."""

    def __init__(self, edit: Edit) -> None:
        self.edit = edit
        self.fired = 0
        self._change: Tensor | float = 0.0
        self._size: Tensor | float = 0.0

    def __call__(self, value: Tensor) -> Tensor:
        """`edit.fn(value)`, counted. Raises: ValueError if the shape changes."""
        new = self.edit.fn(value)
        if not isinstance(new, Tensor) or new.shape != value.shape:
            returned = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise ValueError(
                f"The edit at {self.edit.site} was given {tuple(value.shape)} and returned {returned}. "
                "An edit returns a tensor of the same shape."
            )
        new = new.to(device=value.device, dtype=value.dtype)
        self.fired += 1
        with torch.no_grad():
            was, now = (_masked_as_infinite(x.detach().float()) for x in (value, new))
            # Masked scores are -inf: one that stays so did not move, one that does not moved by one.
            change = torch.where(was == now, 0.0, (now - was).nan_to_num(1.0, 1.0, 1.0))
            self._change = self._change + change.square().sum()
            self._size = self._size + was.nan_to_num(0.0, 0.0, 0.0).square().sum()
        return new

    def receipt(self) -> Receipt:
        change, size = float(self._change), float(self._size)
        moved = 0.0 if change == 0 else (change / size) ** 0.5 if size else float("inf")
        return Receipt(self.edit.site, self.fired, moved)


def _masked_as_infinite(scores: Tensor) -> Tensor:
    # Some models mask with the least number there is, whose square is not a number's size.
    return scores.masked_fill(scores < torch.finfo(torch.float16).min * 2, -torch.inf)
