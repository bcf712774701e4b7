"""Mean and second moment of vectors that come in batches: all that is kept of any number of images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from methods_multimodal.core.record import Record


@dataclass(frozen=True)
class Moments(Record):
    """Sums over images, in float64: of the vectors and of their outer products.

    Leading axes (layer, head) are kept apart. With a `basis` the vectors are coordinates in it: a
    head's output lies in the few directions its output matrix writes, so nothing wider is kept.
    """

    count: int
    total: Float[Tensor, "*group coordinate"]
    outer: Float[Tensor, "*group coordinate coordinate"]
    basis: Float[Tensor, "*group coordinate width"] | None = None

    @classmethod
    def none(cls, *shape: int, basis: Tensor | None = None, device: Any = None) -> Moments:
        """The moments of no image; `shape` is one vector's, with its groups."""
        zeros = torch.zeros(*shape, dtype=torch.float64, device=device)
        outer = torch.zeros(*shape, shape[-1], dtype=torch.float64, device=device)
        return cls(0, zeros, outer, basis)

    @classmethod
    def of(cls, vectors: Float[Tensor, "image *group coordinate"]) -> Moments:
        """The moments of these vectors."""
        return cls.none(*vectors.shape[1:], device=vectors.device).plus(vectors)

    def plus(self, vectors: Float[Tensor, "image *group coordinate"]) -> Moments:
        """The moments with these vectors counted too."""
        wide = vectors.double()
        outer = torch.einsum("n...i,n...j->...ij", wide, wide)
        return replace(
            self, count=self.count + len(vectors), total=self.total + wide.sum(0), outer=self.outer + outer
        )

    def __getitem__(self, group: Any) -> Moments:
        """One group's moments."""
        basis = None if self.basis is None else self.basis[group]
        return replace(self, total=self.total[group], outer=self.outer[group], basis=basis)

    @property
    def mean(self) -> Float[Tensor, "*group width"]:
        """The mean vector, in full width."""
        mean = self.total / max(self.count, 1)
        return mean if self.basis is None else torch.einsum("...i,...iw->...w", mean, self.basis.double())
