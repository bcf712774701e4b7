"""The matched control of an edit: as large a change at the same positions, in a random direction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from methods_multimodal.core.generators import mixed
from methods_multimodal.cross_attention._rows import RowEdit, RowFn

# What such a control is, for reports.
TURNED = "the same change, turned in a random direction"


class Turned:
    """Changes a row as far as another function does at each position, in another direction.

    The change is multiplied by one random rotation of the last axis. Positions, heads and steps are the same,
    each position's change keeps its length, and the angles between the positions' changes stay.
    """

    def __init__(self, fn: RowFn, *seed: int) -> None:
        self.fn = fn
        self.seed = seed
        self._rotation: Tensor | None = None

    def __call__(self, row: Tensor, rows: Tensor) -> Tensor:
        change = self.fn(row.clone(), rows) - row
        if self._rotation is None or len(self._rotation) != row.shape[-1]:
            self._rotation = rotation(row.shape[-1], *self.seed)
        turned = change.float() @ self._rotation.to(row.device)
        return row + turned.to(row.dtype)


def turned(row_edits: Sequence[RowEdit], row: int, *seed: int) -> list[RowEdit]:
    """These edits' matched controls, for another row; each site is turned by a rotation of its own."""
    sites = {edit.site: number for number, edit in enumerate(row_edits)}
    return [RowEdit(e.site, row, Turned(e.fn, *seed, sites[e.site]), e.steps) for e in row_edits]


def rotation(width: int, *seed: int) -> Tensor:
    """A rotation or reflection [width, width] drawn evenly from all of them."""
    q, r = torch.linalg.qr(torch.randn(width, width, generator=mixed(*seed), dtype=torch.float64))
    return (q * r.diagonal().sign()).float()
