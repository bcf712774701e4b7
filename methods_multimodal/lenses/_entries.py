"""Which positions of which rows a lens reads, and the states that stand there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from methods_multimodal.core.model import check_sites
from methods_multimodal.core.positions import in_rows
from methods_multimodal.lenses.reading import Patch
from mm_adapters import InputError, MissingSiteError, Model, Read, TokenLayout, TowerView

# One position of each row; some; all that hold a role of the layout ("image", "word"), or "all" but padding.
Positions = int | str | Sequence[int]


@dataclass(frozen=True)
class Entries:
    """Positions of all rows, one after the other."""

    rows: Int[Tensor, " entry"]
    positions: Int[Tensor, " entry"]
    patches: tuple[Patch | None, ...]
    grid: Patch | None
    where: str

    def of(self, value: Tensor) -> Tensor:
        """A value there: [row, pos, ...] to [entry, ...]."""
        return value[self.rows.to(value.device), self.positions.to(value.device)]

    @property
    def about(self) -> dict[str, Any]:
        """The fields of a reading that say what its entries are."""
        return {
            "rows": tuple(self.rows.tolist()),
            "positions": tuple(self.positions.tolist()),
            "patches": self.patches,
            "grid": self.grid,
            "where": self.where,
        }


def entries_of(model: Model, inputs: Mapping[str, Any], positions: Positions, tower: str) -> Entries:
    """Where to read, in prepared inputs.

    An int below 0 counts back from each row's last attended position, one from 0 on is the position itself,
    counted with the padding; a role takes all positions that have it; "all" those that are no padding.

    Raises: InputError for a position that a row has not, or what is no position; MissingSiteError if no
    position has the role.
    """
    where = "the last position" if positions == -1 else f"position {positions}"
    if isinstance(positions, int):
        positions = [positions]
    elif not isinstance(positions, str):
        where = "each position"
    if not isinstance(positions, str):
        columns = [torch.as_tensor(in_rows(model, inputs, int(p), tower).index) for p in positions]
        if not columns:
            raise InputError("There is no position to read.")
        at = torch.stack(columns, 1).cpu()
        rows = torch.arange(len(at))[:, None].expand_as(at).flatten()
        return Entries(rows, at.flatten(), (None,) * at.numel(), None, where)
    layout = model.layout(**inputs)[tower]
    pairs = [(r, p) for r, roles in enumerate(layout.roles) for p in _places(layout, roles, r, positions)]
    if not pairs:
        roles = ", ".join(dict.fromkeys(role for row in layout.roles for role in row))
        raise MissingSiteError(
            f"The {tower} tower's layout has no {positions!r} role: its positions are {roles}."
        )
    patches = tuple(layout.patches[r][p] if layout.patches else None for r, p in pairs)
    one_image = layout.grid is not None and all(
        len(own := [p for p, (r, _) in zip(patches, pairs, strict=True) if r == row and p is not None])
        == len(set(own))
        for row in range(layout.n_rows)
    )
    rows, at = torch.tensor(pairs).T
    return Entries(
        rows, at, patches, layout.grid if one_image and any(patches) else None, f"{positions} positions"
    )


def stream_sites(model: Model, view: TowerView) -> list[str]:
    """The residual stream before each block, and after the last.

    Raises: MissingSiteError if the tower has no one stream.
    """
    view.check_one_stream()
    n_layers = max(1, view.n_layers())  # A tower without blocks lacks the first one's sites.
    sites = [f"{view.name}.blocks.{i}.hook_resid_pre" for i in range(n_layers)]
    sites.append(f"{view.name}.blocks.{n_layers - 1}.hook_resid_post")
    check_sites(model, sites)
    return sites


def layer_names(n_sites: int) -> tuple[str, ...]:
    """What the stream's sites are called."""
    return ("embedding", *(f"layer {i}" for i in range(n_sites - 1)))


def states_at(model: Model, inputs: Mapping[str, Any], sites: Sequence[str], entries: Entries) -> Tensor:
    """The values of sites there, [entry, site, ...], in float32."""
    run = model.run(inputs, read=[Read(site, reduce=entries.of) for site in sites])
    return torch.stack([run[site].detach().float() for site in sites], 1)


def token_names(model: Model, tokens: Sequence[int], tower: str) -> tuple[str, ...]:
    """The tokens' texts; their numbers, for a model that came without a tokenizer."""
    tokenizer = model.tokenizer_of(tower)
    if tokenizer is None:
        return tuple(f"token {int(t)}" for t in tokens)
    return tuple(tokenizer.decode([int(t)]) for t in tokens)


def _places(layout: TokenLayout, roles: Sequence[str], row: int, wanted: str) -> list[int]:
    if wanted == "all":
        return [p for p, role in enumerate(roles) if role != "pad"]
    if wanted == "text":
        return [p for p, role in enumerate(roles) if role in ("word", "start", "end")]
    if wanted == "image":  # Also what a query transformer made of one.
        return [p for p, role in enumerate(roles) if role in ("image", "query")]
    return layout.positions(wanted, row)
