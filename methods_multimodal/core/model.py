"""What methods ask of a model and its towers, whichever engine runs them."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from mm_adapters import InputError, TowerView


def model_summary(tower: TowerView, output: Any) -> Float[Tensor, "row width"]:
    """The model's own embedding, from what the tower's run gave; in float32, without its graph."""
    return tower.summary(output).detach().float()


def check_one(images: Any, texts: Any) -> str:
    """Which tower is meant. Raises: InputError unless exactly one side is given."""
    if (images is None) == (texts is None):
        raise InputError("Give images or texts, one of the two.")
    return "vision" if texts is None else "text"
