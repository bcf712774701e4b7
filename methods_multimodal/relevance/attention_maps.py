"""Where the heads of a transformer look in the image: attention as maps over its patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from methods_multimodal.core.grids import one_grid
from methods_multimodal.core.model import check_sites
from methods_multimodal.core.positions import RowPositions, in_rows
from methods_multimodal.core.record import Record
from mm_adapters import InputError, Model, Read, TokenLayout


@dataclass(frozen=True)
class HeadMaps(Record):
    """Attention from one position to each patch; what is missing to one goes to other positions."""

    maps: Float[Tensor, "row layer head down across"]
    query: str
    layers: tuple[int, ...]

    @property
    def mean(self) -> Float[Tensor, "row layer down across"]:
        """Averaged over heads."""
        return self.maps.mean(2)

    def mosaic(self, row: int = 0) -> Float[Tensor, "height width"]:
        """The maps of one row side by side: layers downwards, heads across."""
        return rearrange(self.maps[row], "layer head down across -> (layer down) (head across)")


def head_maps(
    model: Model,
    inputs: Mapping[str, Any],
    layout: TokenLayout,
    *,
    tower: str,
    layers: Sequence[int],
    query: int | None = 0,
    query_name: str = "class token",
) -> HeadMaps:
    """Each head's attention from one position to the patches, as the model computed it.

    Args:
        inputs: The model's inputs, raw or prepared.
        layout: Which positions of the tower are patches, and of what grid: `model.layout(...)[tower]`.
        tower: The tower whose heads attend.
        layers: Which of its blocks.
        query: The position that attends: of a language tower -1 is each row's last attended one, of a
            vision tower the last that is no padding. None is the mean over all positions, padding too.
        query_name: What the result calls that position.

    Raises: MissingSiteError if the layout has no patches, or the tower no patterns; InputError if the layout
    has not one grid of patches, at the same positions in every row, or a row has no such position.
    """
    sites = [f"{tower}.blocks.{layer}.attn.hook_pattern" for layer in layers]
    check_sites(model, sites)
    columns, grid = one_grid(layout, tower)
    at = None if query is None else _query(model, inputs, layout, query, tower)

    def to_patches(pattern: Tensor) -> Tensor:
        rows = pattern.float().mean(2) if at is None else at.of(pattern.transpose(1, 2)).float()
        return rows[..., columns]

    run = model.run(inputs, read=[Read(site, reduce=to_patches) for site in sites])
    flat = torch.stack([run[site] for site in sites], 1)
    maps = rearrange(flat, "row layer head (down across) -> row layer head down across", down=grid[0])
    return HeadMaps(maps=maps, query=query_name, layers=tuple(int(i) for i in layers))


def _query(
    model: Model, inputs: Mapping[str, Any], layout: TokenLayout, query: int, tower: str
) -> RowPositions:
    if query < 0 and model.check_tower(tower).role == "vision":  # Its rows have one grid, so one padding.
        kept = [pos for pos, role in enumerate(layout.roles[0]) if role != "pad"]
        if len(kept) < -query:
            raise InputError(f"query={query}: the rows of {tower} have {len(kept)} positions.")
        return RowPositions(kept[query])
    return in_rows(model, inputs, query, tower)
