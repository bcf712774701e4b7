"""The protocol of a model, whichever engine runs it: what public methods take first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from mm_adapters.inputs.prepare import Inputs
from mm_adapters.records.spec import Guidance, Kind, ModelRecord, Site
from mm_adapters.runs.lens import Lens
from mm_adapters.sites.site_map import SiteTable
from mm_adapters.sites.tower_view import TowerView
from mm_adapters.tokens.by_part import Layouts
from mm_adapters.tokens.layout import TokenLayout


@runtime_checkable
class Model(Lens, Protocol):
    """A Lens that knows its towers and sites, and prepares raw inputs: HookedModel and TracedModel."""

    @property
    def name(self) -> str:
        """What it was loaded as ("tiny-clip"), else its family."""
        ...

    @property
    def kind(self) -> Kind:
        """ "contrastive", "vlm", "diffusion" or "tower"."""
        ...

    @property
    def record(self) -> ModelRecord:
        """What its family says of it."""
        ...

    @property
    def wrapped(self) -> Any:
        """The module or pipeline it was made of."""
        ...

    @property
    def towers(self) -> Mapping[str, TowerView]:
        """Its towers by name, in the order they run."""
        ...

    @property
    def preparer(self) -> Inputs | None:
        """What makes raw texts and images the model's own arguments; None if it came without."""
        ...

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its weights."""
        ...

    def sites(self, pattern: str = "*") -> SiteTable:
        """The sites whose names match a glob, and what is absent there, with the reason."""
        ...

    def check_site(self, name: str) -> Site:
        """The site of this name. Raises: MissingSiteError with the reason, or the nearest names."""
        ...

    def check_tower(self, name: str) -> TowerView:
        """The tower of this name. Raises: MissingSiteError naming those there are."""
        ...

    def loops(self) -> Mapping[str, Guidance | None]:
        """The towers that sampling loops call, each with how it is guided; none outside pipelines."""
        ...

    def prepare(self, *, text: Any = None, images: Any = None) -> dict[str, Any]:
        """Raw text and images as the wrapped model's own arguments, on its device, in its dtype."""
        ...

    def layout(self, *, text: Any = None, images: Any = None, **prepared: Any) -> Layouts:
        """What each position of each tower is, for raw or prepared inputs; `.at(site)`, of a site."""
        ...

    def row_positions(
        self, inputs: Mapping[str, Any], position: int = -1, tower: str = "language"
    ) -> Int[Tensor, " row"]:
        """Where one position of each row stands; -1 is the row's last attended position."""
        ...

    def prompt_layout(self, tower: str, texts: list[str]) -> TokenLayout:
        """What each position of a pipeline's prompts is, padded as the pipeline pads them."""
        ...

    def tokenizer_of(self, tower: str) -> Any:
        """The tokenizer of a text tower, or None."""
        ...
