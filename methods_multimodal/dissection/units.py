"""The units of one site, each as a map over the picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from methods_multimodal.core.grids import latent_grid
from mm_adapters import HookedModel, InputError, Lens, Read, Site

Pool = Literal["mean", "max"]


@dataclass(frozen=True)
class Units:
    """What is dissected: every unit of one site, wherever that site is.

    A token grid (patches of a vision tower, image tokens of a language tower, latents of a denoiser)
    and a feature map [channel, height, width] both become one map per unit. The units of q, k, v and z
    are heads times width. `through` turns a value [..., width] into units [..., unit] first: an SAE's
    `encode`, say. Through a sampling loop the maps are the mean over `steps` (None: all of them) of the
    conditional half.

    Raises: MissingSiteError; InputError if the site has no units that lie on a grid.
    """

    model: HookedModel
    site: str
    lens: Lens | None = None
    through: Callable[[Tensor], Tensor] | None = None
    steps: Sequence[int] | None = None

    def __post_init__(self) -> None:
        axes = self.described.axes
        if axes[1] not in ("pos", "channel") or axes[-1] == "1":
            raise InputError(
                f"{self.site} is [{', '.join(axes)}]: it has no units on a grid. "
                "Take a residual, an MLP's hook_post, a hook_z or a feature map."
            )
        if self.steps is not None and not self._looped:
            raise InputError(f"{self.site} has no sampling steps; leave `steps` out.")

    @cached_property
    def described(self) -> Site:
        """The site. Raises: MissingSiteError if it does not exist or is absent."""
        return self.model.sitemap[self.site]

    @property
    def _looped(self) -> bool:
        return self.described.tower in self.model.sitemap.loops

    def maps(self, inputs: Mapping[str, Any]) -> Float[Tensor, "image unit row column"]:
        """Each unit's activation at each place of each picture of these inputs, in float32."""
        reads: list[Read] = [self._read()]
        if self._looped:
            size = f"{self.described.tower}.hook_in"
            reads.append(Read(size, reduce=lambda x: torch.tensor(x.shape[-2:])[None], steps=[0]))
        run = (self.lens or self.model).run(inputs, read=reads)
        value = run[self.site]
        if self._looped:
            # Only the steps asked for were kept; they come first.
            value = value.mean(0)
        if self.described.axes[1] == "channel":
            return value
        if self._looped:
            height, width = (int(n) for n in run[f"{self.described.tower}.hook_in"].flatten())
            rows, _ = latent_grid(value.shape[1], (height, width))
            return rearrange(value, "image (row column) unit -> image unit row column", row=rows)
        return self._on_grid(value, inputs)

    def pooled(self, inputs: Mapping[str, Any], pool: Pool = "mean") -> Float[Tensor, "image unit"]:
        """One number per picture and unit: the mean over the places, or the largest."""
        maps = self.maps(inputs).flatten(2)
        return maps.amax(2) if pool == "max" else maps.mean(2)

    def _read(self) -> Read:
        channels = self.described.axes[1] == "channel"

        def units(value: Tensor) -> Tensor:
            value = value.detach()
            if channels and self.through is not None:
                return rearrange(
                    self.through(rearrange(value, "b c h w -> b h w c")), "b h w u -> b u h w"
                ).float()
            if not channels:
                value = value.flatten(2)
            return (value if self.through is None or channels else self.through(value)).float()

        return Read(self.site, reduce=units, steps=self.steps, rows="cond" if self._guided else "all")

    @property
    def _guided(self) -> bool:
        return self.model.sitemap.loops.get(self.described.tower) is not None

    def _on_grid(
        self, value: Float[Tensor, "row pos unit"], inputs: Mapping[str, Any]
    ) -> Float[Tensor, "row unit down across"]:
        found = self.model.layout(**inputs)
        layout = found.get(self.described.tower)
        if layout is None or layout.grid is None:
            raise InputError(
                f"The positions of {self.site} do not lie on one grid, so its units have no maps. "
                f"Towers with a grid: {', '.join(t for t, one in found.items() if one.grid) or 'none'}."
            )
        down, across = layout.grid
        places = [[p for p, spot in enumerate(row) if spot is not None] for row in layout.patches]
        if any(len(row) != down * across for row in places):
            raise InputError(
                f"A dissection takes one image per row; a row of {self.site} has none, or several."
            )
        chosen = torch.tensor(places, device=value.device)[..., None].expand(-1, -1, value.shape[-1])
        return rearrange(value.gather(1, chosen), "b (r c) unit -> b unit r c", r=down)
