"""One position of each row of a value: in padded rows, -1 is the last position that is attended to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mm_adapters import Model


@dataclass(frozen=True)
class RowPositions:
    """Where one position of each row stands; an int where it is the same in all rows."""

    index: Int[Tensor, " row"] | int

    def of(self, value: Tensor) -> Tensor:
        """The value at each row's position: [row, pos, ...] to [row, ...]."""
        if isinstance(self.index, int):
            return value[:, self.index]
        rows = torch.arange(len(value), device=value.device)
        return value[rows, self.index.to(value.device)]


def in_rows(model: Model, inputs: Mapping[str, Any], position: int, tower: str) -> RowPositions:
    """Where one position of each row stands in a tower; below 0 it counts back from the last attended.

    Of a tower that reads no text nothing is padded in this sense, and it counts back from the last.

    Raises: InputError if a row has no such position.
    """
    if model.check_tower(tower).role not in ("text", "language"):
        return RowPositions(position)
    return RowPositions(model.row_positions(inputs, position, tower))
