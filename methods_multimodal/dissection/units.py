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

from methods_multimodal.core.grids import latent_grid, patch_positions
from methods_multimodal.diffusion.pictures import check_pictures
from mm_adapters import InputError, MissingSiteError, Model, Read, Site, TokenLayout

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

    model: Model
    site: str
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
        return self.model.check_site(self.site)

    @property
    def _is_map(self) -> bool:
        return self.described.axes[1] == "channel"

    @property
    def _looped(self) -> bool:
        return self.described.tower in self.model.loops()

    def maps(self, inputs: Mapping[str, Any]) -> Float[Tensor, "image unit row column"]:
        """Each unit's activation at each place of each picture of these inputs, in float32.

        Raises: MissingSiteError if the site's tower has no patches; InputError if a row has several images.
        """
        reads: list[Read] = [self._read()]
        if self._looped:
            size = f"{self.described.tower}.hook_in"
            reads.append(Read(size, reduce=lambda x: torch.tensor(x.shape[-2:])[None], steps=[0]))
        layout = None if self._looped or self._is_map else self._layout(inputs)
        grid = self._packed_grid(inputs) if self._looped and not self._is_map else None
        run = self.model.run(inputs, read=reads)
        value = run[self.site]
        if self._looped:
            # Only the steps asked for were kept; they come first.
            value = value.mean(0)
        if self._is_map:
            return value
        if self._looped:
            if grid is None:
                height, width = (int(n) for n in run[f"{self.described.tower}.hook_in"].flatten())
                grid = latent_grid(value.shape[1], (height, width))
            value = value[:, -grid[0] * grid[1] :]  # After the text, where both are one sequence.
            return rearrange(value, "image (row column) unit -> image unit row column", row=grid[0])
        assert layout is not None
        return self._on_grid(value, layout)

    def pooled(self, inputs: Mapping[str, Any], pool: Pool = "mean") -> Float[Tensor, "image unit"]:
        """One number per picture and unit: the mean over the places, or the largest."""
        maps = self.maps(inputs).flatten(2)
        return maps.amax(2) if pool == "max" else maps.mean(2)

    def _read(self) -> Read:
        channels = self._is_map

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
        return self.model.loops().get(self.described.tower) is not None

    def _packed_grid(self, inputs: Mapping[str, Any]) -> tuple[int, int] | None:
        """The grid of a loop whose latents are packed into positions; None of one whose latents are a map.

        Raises: MissingSiteError if the loop denoises no picture.
        """
        tower, sampling = check_pictures(self.model, self.described.tower)
        if not sampling.packed:
            return None
        sizes = {k: v for k, v in inputs.items() if k in ("height", "width", "max_sequence_length")}
        return self.model.layout(text=["a"], **sizes)[tower].grid

    def _layout(self, inputs: Mapping[str, Any]) -> TokenLayout:
        """The layout of the site's tower, found before anything runs."""
        tower = self.model.check_tower(self.described.tower)
        needed = dict(inputs)
        if tower.role == "vision" and self.model.kind in ("contrastive", "tower"):
            # The other tower's inputs have no part in where the patches are.
            names = (tower.input_name, tower.record.grids, "images")
            needed = {name: value for name, value in inputs.items() if name in names}
        layouts = self.model.layout(**needed) if needed else None
        layout = None if layouts is None else layouts.find(self.site)
        if layout is None:
            others = ", ".join(name for name, one in (layouts or {}).items() if one.grid) or "none"
            raise MissingSiteError(
                f"The {tower.name} tower's layout has no 'patch' role, so the units of {self.site} have no "
                f"maps. Towers with a grid: {others}."
            )
        rows = patch_positions(layout, tower.name)
        if layout.grid is None or any(len(row) != layout.grid[0] * layout.grid[1] for row in rows):
            raise InputError(
                f"A dissection takes one image per row; a row of {self.site} has none, or several."
            )
        return layout

    def _on_grid(
        self, value: Float[Tensor, "row pos unit"], layout: TokenLayout
    ) -> Float[Tensor, "row unit down across"]:
        positions = torch.tensor(patch_positions(layout, self.described.tower), device=value.device)
        index = positions[..., None].expand(-1, -1, value.shape[-1])
        assert layout.grid is not None
        return rearrange(value.gather(1, index), "b (r c) unit -> b unit r c", r=layout.grid[0])
