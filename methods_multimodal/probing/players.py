"""The tokens that share out a prediction: words one by one, and squares of the picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from methods_multimodal.core.grids import one_grid, patch_positions
from methods_multimodal.core.model import check_sites
from methods_multimodal.probing.roles import layout_of
from mm_adapters import Edit, InputError, MissingSiteError, Model, TokenLayout


@dataclass(frozen=True)
class Player:
    """Some positions of a tower's first stream that are hidden together."""

    site: str
    positions: tuple[int, ...]
    is_text: bool
    name: str


def players_of(model: Model, inputs: Mapping[str, Any], side: int | None) -> list[Player]:
    """The words of one row, and side x side squares of its picture; without `side` as many as words, or more.

    They are hidden where the tower's first block begins: in the language tower, or each in its own.

    Raises: MissingSiteError if the model has no words or no patches; InputError for several rows or images.
    """
    text_tower = next((t.name for t in model.towers.values() if t.role in ("text", "language")), None)
    if text_tower is None:
        raise MissingSiteError(
            f"{model.name}: no tower 'language' or 'text' reads words, so nothing is shared."
        )
    site = f"{text_tower}.blocks.0.hook_resid_pre"
    check_sites(model, [site])
    layout = _layout(model, inputs, site)
    if layout.n_rows != 1:
        raise InputError(
            f"Shares are of one row, one image, one grid at a time, and this has {layout.n_rows} rows. Give "
            "them one by one."
        )
    words = layout.positions("word")
    if not words:
        raise MissingSiteError(
            f"The {text_tower} tower's layout has no 'word' role: there is no word to hide."
        )
    of_image, image_site = layout, site
    if not any(place is not None for row in layout.patches for place in row):
        image_site = "vision.blocks.0.hook_resid_pre"
        check_sites(model, [image_site])
        of_image = _layout(model, inputs, image_site)
        patch_positions(of_image, "vision")
    columns, grid = one_grid(of_image, image_site.partition(".")[0])
    side = math.ceil(math.sqrt(len(words))) if side is None else side
    side = min(side, *grid)
    if side < 1:
        raise InputError(f"side={side}: a picture is cut into at least one square.")
    squares: dict[tuple[int, int], list[int]] = {}
    for position in columns:
        row, column = of_image.patch_rc(position)
        squares.setdefault((row * side // grid[0], column * side // grid[1]), []).append(position)
    names = _names(layout, words)
    texts = [Player(site, (p,), True, name) for p, name in zip(words, names, strict=True)]
    return texts + [Player(image_site, tuple(p), False, f"square {r}, {c}") for (r, c), p in squares.items()]


def hide(players: Sequence[Player], shown: Bool[Tensor, "copy player"]) -> list[Edit]:
    """Edits of a run of copies that set what each copy does not show to zero."""
    edits = []
    for site in dict.fromkeys(player.site for player in players):
        own = [(i, player) for i, player in enumerate(players) if player.site == site]
        edits.append(
            Edit(site, _Hiding([player.positions for _, player in own], shown[:, [i for i, _ in own]]))
        )
    return edits


@dataclass(frozen=True)
class _Hiding:
    """Sets positions of some rows to zero."""

    positions: Sequence[tuple[int, ...]]
    shown: Bool[Tensor, "copy player"]

    def __call__(self, value: Float[Tensor, "copy pos width"]) -> Float[Tensor, "copy pos width"]:
        keep = torch.ones(value.shape[:2], dtype=value.dtype)
        for i, positions in enumerate(self.positions):
            keep[:, list(positions)] = self.shown[:, i, None].to(value.dtype)
        return value * keep.to(value.device)[..., None]


def _layout(model: Model, inputs: Mapping[str, Any], site: str) -> TokenLayout:
    layout = layout_of(model, inputs, site)
    if layout is None:
        tower = site.partition(".")[0]
        raise MissingSiteError(
            f"The {tower} tower's layout has no 'patch' role: it is not known what {site} holds."
        )
    return layout


def _names(layout: TokenLayout, positions: Sequence[int]) -> list[str]:
    """The word or mark that each position is a token of."""
    entries = (layout.words[0] if layout.words else ()) + (layout.marks[0] if layout.marks else ())
    by_position = {p: entry.text for entry in entries for p in entry.positions}
    return [by_position.get(position, f"position {position}") for position in positions]
