"""The same tower with its weights in random places: units that cannot mean anything, for a null."""

from __future__ import annotations

from methods_multimodal.core.generators import Seed
from methods_multimodal.core.shuffled_weights import shuffled_copy
from methods_multimodal.dissection.units import Units
from mm_adapters import Model


def with_shuffled_weights(model: Model, tower: str, seed: Seed = 0) -> Model:
    """A copy of the model in which each tensor of the tower's weights holds its numbers in random order.

    So the tower is as wide, as deep and as strong as it was, whatever it is, and what training put where is
    gone. The other towers stay. The copy takes as much memory as the model.

    Source: the model randomization test of Adebayo et al. 2018, arXiv 1810.03292, section 3.
    Raises: MissingSiteError if there is no such tower.
    """
    return shuffled_copy(model, [tower], seed)


def twins_of(units: Units, n: int, seed: int = 0) -> list[Units]:
    """The same units of `n` copies of the model with shuffled weights, for `survey(twins=...)`."""
    tower = units.described.tower
    return [
        Units(with_shuffled_weights(units.model, tower, seed + i), units.site, units.through, units.steps)
        for i in range(n)
    ]
