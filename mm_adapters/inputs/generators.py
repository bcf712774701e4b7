"""Seeds as torch generators, which is what diffusers' pipelines take."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def seeded(seed: int | Sequence[int], device: torch.device) -> torch.Generator | list[torch.Generator]:
    """A generator on a device for a seed, or one for each of several."""
    if isinstance(seed, Sequence):
        return [torch.Generator(device).manual_seed(int(one)) for one in seed]
    return torch.Generator(device).manual_seed(int(seed))
