"""Where the heads of a transformer look in the image: attention as maps over its patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from methods_multimodal.core.record import Record
from mm_adapters import InputError, Lens, Read
from mm_adapters.tokens.layout import TokenLayout


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
    lens: Lens,
    inputs: Mapping[str, Any],
    layout: TokenLayout,
    *,
    tower: str,
    layers: Sequence[int],
    query: int | None = 0,
    query_name: str = "class token",
) -> HeadMaps:
    """Each head's attention from position `query` to the patches, as the model computed it.

    A `query` of None is the mean over all positions.

    `layout` says which positions are patches, and of what grid.

    Raises: InputError if the layout has no one grid of patches, at the same places in every row.
    """
    role = "image" if "image" in layout.roles[0] else "patch"
    places = [p for p in layout.positions(role) if layout.patches[0][p] is not None]
    if any(patches != layout.patches[0] for patches in layout.patches):
        raise InputError("The rows have their patches at different positions: read them one by one.")
    if layout.grid is None or len(places) != layout.grid[0] * layout.grid[1]:
        raise InputError(f"{len(places)} patches and a grid {layout.grid}: a map needs one image, one grid.")

    def seen(pattern: Tensor) -> Tensor:
        rows = pattern.float().mean(2) if query is None else pattern[:, :, query].float()
        return rows[..., places]

    sites = [f"{tower}.blocks.{layer}.attn.hook_pattern" for layer in layers]
    run = lens.run(inputs, read=[Read(site, reduce=seen) for site in sites])
    flat = torch.stack([run[site] for site in sites], 1)
    maps = rearrange(flat, "row layer head (down across) -> row layer head down across", down=layout.grid[0])
    return HeadMaps(maps=maps, query=query_name, layers=tuple(int(i) for i in layers))
