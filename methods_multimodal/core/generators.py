"""Random numbers by a seed, by several numbers, or by the caller's generator: never torch's global one."""

from __future__ import annotations

import torch

Seed = int | torch.Generator


def generator(seed: Seed) -> torch.Generator:
    """A generator on the CPU with this seed; one that is given is handed back, and moved on by who draws."""
    return seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)


def mixed(*numbers: int) -> torch.Generator:
    """A generator on the CPU that is a function of all these numbers, from 0, and of their order.

    For draws that must not depend on what was drawn before them: noise by example and timestep, say.
    """
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (2**63 - 25)
    return torch.Generator().manual_seed(seed)
