"""The activation that a unit exceeds at a given share of all places."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from methods_multimodal.core.generators import Seed, generator


class TopShare:
    """Exact: keeps each unit's largest values, as many as the share of `n_values` comes to."""

    def __init__(self, share: float, n_values: int) -> None:
        self._keep = math.floor(share * n_values) + 1
        self._n_values = n_values
        self._seen = 0
        self._best: Tensor | None = None

    def add(self, values: Float[Tensor, "value unit"]) -> None:
        """Takes more places into account."""
        self._seen += len(values)
        best = values.float() if self._best is None else torch.cat([self._best, values.float()])
        self._best = best.topk(min(self._keep, len(best)), 0).values

    def threshold(self) -> Float[Tensor, " unit"]:
        """The largest value that at most the share exceeds."""
        assert self._best is not None
        assert self._seen == self._n_values, (self._seen, self._n_values)
        return self._best[self._keep - 1]


class Sketch:
    """Approximate, for a stream of unknown length, in memory that grows with its logarithm only.

    Level k holds values that stand for 2 ** k each; a full level is sorted and every other value goes
    up, odd or even by chance. The rank error is about 1 / `size` of all values a level.

    Source: Karnin, Lang & Liberty 2016, arXiv 1603.05346, with levels of one size.
    """

    def __init__(self, share: float, *, size: int = 2048, seed: Seed = 0) -> None:
        self._share, self._size = share, size
        self._levels: list[Tensor] = []
        self._chance = generator(seed)

    def add(self, values: Float[Tensor, "value unit"]) -> None:
        """Takes more places into account."""
        self._push(0, values.float())

    def _push(self, level: int, values: Tensor) -> None:
        if level == len(self._levels):
            self._levels.append(values[:0])
        held = torch.cat([self._levels[level], values])
        if len(held) >= self._size:
            whole = len(held) - len(held) % 2
            odd = int(torch.randint(2, (), generator=self._chance))
            self._levels[level] = held[whole:]
            self._push(level + 1, held[:whole].sort(0).values[odd::2])
        else:
            self._levels[level] = held

    def threshold(self) -> Float[Tensor, " unit"]:
        """The smallest value that at most the share exceeds, as far as is known."""
        values = torch.cat(self._levels)
        weights = torch.cat([torch.full((len(v),), 2.0**k) for k, v in enumerate(self._levels)])
        values, order = values.sort(0, descending=True)
        above = weights.to(values.device)[order].cumsum(0)
        allowed = self._share * above[-1:]
        first = (above > allowed).float().argmax(0)
        return values.gather(0, first[None])[0]
