"""What keeps names honest: chance, held-out prediction, and what one constant name would reach."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.stats import false_discovery_control
from torch import Tensor

from methods_multimodal.core.generators import Seed, generator
from methods_multimodal.core.record import Record
from methods_multimodal.core.statistics import auroc

Score = Callable[[Tensor], Float[Tensor, "unit concept"]]


@dataclass(frozen=True)
class Chance(Record):
    """Each unit's best score beside what units reach when their images are shuffled.

    Scores are standardised by each unit's own shuffles; `p` is the share of all units' shuffles that do
    as well (with one added to both counts), `q` the same after the correction of Benjamini and Hochberg
    1995 over the units.
    """

    best: Float[Tensor, " unit"]
    p: Float[Tensor, " unit"]
    q: Float[Tensor, " unit"]
    n_shuffles: int

    def significant(self, level: float = 0.05) -> list[int]:
        """The units whose name is better than chance at this false-discovery rate."""
        return (self.q <= level).nonzero().flatten().tolist()


def chance(score: Score, n_images: int, *, n_shuffles: int = 199, seed: Seed = 0) -> Chance:
    """Whether a unit's best score over the concepts is more than chance.

    `score(order)` must give the scores [unit, concept] with image i's activations set against the
    concepts of image `order[i]`; the true order is 0, 1, 2 ...
    """
    rng = generator(seed)
    best = score(torch.arange(n_images)).amax(1)
    shuffled = torch.stack(
        [score(torch.randperm(n_images, generator=rng)).amax(1) for _ in range(n_shuffles)]
    )
    mean, spread = shuffled.mean(0), shuffled.std(0).clamp_min(1e-12)
    pool = ((shuffled - mean) / spread).flatten().sort().values
    as_good = len(pool) - torch.searchsorted(pool, ((best - mean) / spread).contiguous())
    p = (1 + as_good) / (1 + len(pool))
    q = torch.from_numpy(false_discovery_control(p.numpy().astype(np.float64), method="bh")).float()
    return Chance(best, p, q, n_shuffles)


def cell_iou(
    active: Bool[Tensor, "image unit row column"], covered: Float[Tensor, "image concept row column"]
) -> Score:
    """IoU on the units' own grid, for shuffling: what `shares` says of the masks, not their pixels."""
    n_cells = active.shape[-1] * active.shape[-2]
    on = active.flatten(2).float()
    under = covered.flatten(2).float()
    areas = on.sum((0, 2))[:, None] + under.sum((0, 2))[None]

    def score(order: Tensor) -> Tensor:
        shared = torch.zeros(on.shape[1], under.shape[1])
        # A part of the images at a time: their units and concepts side by side would be large.
        step = max(1, 2**22 // (n_cells * on.shape[1]))
        for first in range(0, len(on), step):
            some = slice(first, first + step)
            shared += torch.einsum("iup,icp->uc", on[some], under[order[some]])
        return shared / (areas - shared).clamp_min(1e-9)

    return score


@dataclass(frozen=True)
class Faithfulness(Record):
    """How well each unit's name predicts it on held-out images.

    `auroc[unit]` of the unit's own name; `constant[unit]` of the one name that does best for all units
    together, `constant_name`: a method that does no better tells nothing of the units.
    """

    auroc: Float[Tensor, " unit"]
    constant: Float[Tensor, " unit"]
    constant_name: str


def faithfulness(
    named: Sequence[str],
    activations: Float[Tensor, "image unit"],
    present: Bool[Tensor, "image concept"],
    names: Sequence[str],
) -> Faithfulness:
    """The held-out AUROC of every unit's name, and of the always-same name.

    `present` says what each held-out image shows, in the order of `names`.
    """
    table = auroc(activations, present).nan_to_num(0.5)
    of_name = torch.stack([table[unit, list(names).index(name)] for unit, name in enumerate(named)])
    best = int(table.mean(0).argmax())
    return Faithfulness(of_name, table[:, best], names[best])


def agreement(named: Mapping[str, Sequence[str]]) -> Float[Tensor, "method method"]:
    """The share of units that two methods give the same name, for every two of the methods."""
    methods = list(named.values())
    rows = [[float(np.mean([x == y for x, y in zip(a, b, strict=True)])) for b in methods] for a in methods]
    return torch.tensor(rows)
