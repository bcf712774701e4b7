"""How much each piece of a run does, over prompts and seeds, with intervals and a control."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from methods_multimodal.core.record import Record
from methods_multimodal.core.statistics import paired_interval, spearman
from methods_multimodal.cross_attention.cases import Part
from mm_adapters import InputError


@dataclass(frozen=True)
class Interval:
    """A mean over cases, and the bounds of its interval."""

    mean: Float[Tensor, " part"]
    low: Float[Tensor, " part"]
    high: Float[Tensor, " part"]


@dataclass(frozen=True)
class Effects(Record):
    """The metric of each case's picture after each intervention, and without any.

    `base` is the picture as it is, `goal` the one that a whole intervention would give. `control` is each
    part's matched control: at the same layers, heads and steps, the same positions changed as far in a random
    direction, or, where attention is blocked, another word or phrase of as many tokens blocked. `control_of`
    says which, by case; it is "" of a case that has none, because its prompt has no such word, and `control`
    has the other cases alone.

    `layers`, `heads` and `steps` say what each part is; an empty tuple is all. `by_construction` is True of a
    part that is everything and gave the goal's own picture in every case: that is no finding.
    """

    changed: Float[Tensor, "part case"]
    base: Float[Tensor, " case"]
    goal: Float[Tensor, " case"]
    control: Float[Tensor, "part controlled"]
    layers: tuple[tuple[int, ...], ...]
    heads: tuple[tuple[int, ...], ...]
    steps: tuple[tuple[int, ...], ...]
    what: str
    metric: str
    control_of: tuple[str, ...]
    by_construction: tuple[bool, ...]

    @property
    def parts(self) -> tuple[Part, ...]:
        """The pieces, in the order of `changed`."""
        every = zip(self.layers, self.heads, self.steps, strict=True)
        return tuple(Part(a or None, b or None, c or None) for a, b, c in every)

    def share(self, level: float = 0.95, draws: int = 2000, seed: int = 0) -> Interval:
        """Each part's effect as a share of the whole: 0 changes nothing, 1 reaches the goal.

        The mean change over cases by the mean change to the goal; cases are drawn again with
        replacement for the interval.

        Raises: InputError if the goal is no change on average, so that there is nothing to share.
        """
        gap = self.goal - self.base
        if abs(float(gap.mean())) < 1e-9:
            raise InputError("The metric is the same at the goal as at the base, so an effect has no scale.")
        return _interval(self.changed - self.base, gap, level, draws, seed)

    def shift(self, level: float = 0.95, draws: int = 2000, seed: int = 0) -> Interval:
        """Each part's effect in the metric's own unit."""
        return _interval(self.changed - self.base, torch.ones_like(self.base), level, draws, seed)

    def control_share(self, level: float = 0.95, draws: int = 2000, seed: int = 0) -> Interval:
        """As `share`, of each part's control, over the cases that have one; NaN without any."""
        control, base, goal, _ = self._controlled()
        return _interval(control - base, goal - base, level, draws, seed)

    def control_shift(self, level: float = 0.95, draws: int = 2000, seed: int = 0) -> Interval:
        """As `shift`, of each part's control."""
        control, base, _, _ = self._controlled()
        return _interval(control - base, torch.ones_like(base), level, draws, seed)

    def above_control(self, level: float = 0.95, draws: int = 2000, seed: int = 0) -> Interval:
        """Each part's share less its control's, over the cases that have one, paired by case."""
        control, base, goal, changed = self._controlled()
        return _interval(changed - control, goal - base, level, draws, seed)

    def _controlled(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The control, base, goal and changed of the cases that have a control."""
        kept = torch.tensor([bool(name) for name in self.control_of])
        return self.control, self.base[kept], self.goal[kept], self.changed[:, kept]


def correlation(one: Float[Tensor, " part"], two: Float[Tensor, " part"]) -> tuple[float, float]:
    """Pearson's and Spearman's, between two estimates of the same effects."""
    pearson = torch.corrcoef(torch.stack([one.double(), two.double()]))[0, 1]
    return float(pearson), float(spearman(one[:, None], two[:, None]))


def _interval(
    change: Float[Tensor, "part case"], gap: Float[Tensor, " case"], level: float, draws: int, seed: int
) -> Interval:
    change, gap = change.cpu(), gap.cpu()
    if not len(gap):
        nothing = torch.full((len(change),), torch.nan)
        return Interval(nothing, nothing, nothing)

    def ratio(of: NDArray[np.float64], to: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        return of.mean(axis) / to.mean(axis)

    bounds = paired_interval(
        ratio, change.double().numpy(), gap.double().numpy(), level=level, n_resamples=draws, rng=seed
    )
    return Interval(change.mean(1) / gap.mean(), *torch.from_numpy(bounds).float())
