"""One input many times over, so that variants of it share a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from einops import repeat
from torch import Tensor

from mm_adapters import Model


def copied(inputs: Mapping[str, Any], n: int) -> dict[str, Any]:
    """The model's own arguments, each tensor with its rows `n` times, one copy after the other."""
    return {
        key: repeat(value, "row ... -> (copy row) ...", copy=n)
        if isinstance(value, Tensor) and value.ndim
        else value
        for key, value in inputs.items()
    }


def can_be_copied(model: Model) -> bool:
    """Whether copies share a run: not where the patches of all images are one row."""
    return not any(t.record.packed or t.record.order == "end to end" for t in model.towers.values())
