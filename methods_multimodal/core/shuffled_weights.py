"""A copy of a model with the weights of some towers in random places: a null for what training put there."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch

from methods_multimodal.core.generators import Seed, generator
from mm_adapters import Model


def shuffled_copy(model: Model, towers: Iterable[str], seed: Seed = 0) -> Model:
    """A copy in which each tensor of these towers' weights holds its numbers in random order.

    Raises: MissingSiteError if there is no such tower.
    """
    names = list(towers)
    for name in names:
        model.check_tower(name)
    twin, rng = copy.deepcopy(model), generator(seed)
    with torch.no_grad():
        for name in names:
            for weight in twin.check_tower(name).module.parameters():
                order = torch.randperm(weight.numel(), generator=rng).to(weight.device)
                weight.copy_(weight.flatten()[order].view_as(weight))
    return twin
