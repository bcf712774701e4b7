"""Which positions of a row a probe reads: those of a role, the last one, or all that are no padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from mm_adapters import InputError, MissingSiteError, Model, TokenLayout

MEAN, LAST = "mean", "last"


@dataclass(frozen=True)
class Pooling:
    """Folds a value [row, pos, ...] to [row, role, width], in float32: the mean over each role's positions.

    `weights` are those of each position; None where all places count alike (a feature map's, a latent's).
    """

    weights: Float[Tensor, "row role pos"] | None
    is_map: bool

    def __call__(self, value: Tensor) -> Float[Tensor, "row role width"]:
        value = value.detach().float()
        if self.weights is None:
            places = value.flatten(2).mean(2) if self.is_map else value.flatten(2).mean(1)
            return rearrange(places, "row width -> row 1 width")
        if self.weights.shape[::2] != value.shape[:2]:
            rows, n_pos = self.weights.shape[::2]
            raise InputError(
                f"A probe expected {rows} rows of {n_pos} positions and got {tuple(value.shape[:2])}. Give "
                "one picture or text a row, and one picture a prompt."
            )
        weights = self.weights.to(value.device)
        return einsum(weights, value.flatten(2), "row role pos, row pos width -> row role width")


def pooling(model: Model, inputs: Mapping[str, Any], site: str, roles: Sequence[str]) -> Pooling:
    """How a site's values on these inputs are folded; nothing runs.

    "mean" is every position that is no padding, "last" the last such one; all else is a role of the layout.

    Raises: MissingSiteError for a site or role that there is not; InputError for a role that some row lacks,
    or a site without positions.
    """
    described = model.check_site(site)
    axes = described.axes
    if len(axes) < 3 or axes[1] not in ("pos", "channel") or axes[-1] in ("1", "key"):
        raise InputError(
            f"{site} is [{', '.join(axes)}], which is no vector at each position. Probe a residual stream, "
            "an MLP's hook_post, a hook_z or a feature map."
        )
    is_map = axes[1] == "channel"
    attended = None if is_map else _attended(model, inputs, described.tower)
    # Of a language model's ids what is attended is known without a tokenizer, which a layout needs.
    is_plain = model.kind == "tower" and attended is not None and set(roles) <= attended.keys()
    layout = None if is_map or is_plain else layout_of(model, inputs, site)
    masks = None if layout is not None else attended
    if masks is not None and all(role in masks for role in roles):
        weights = torch.stack([masks[role] for role in roles], 1).float()
        return Pooling(weights / weights.sum(2, keepdim=True), is_map)
    if layout is None:
        for role in roles:
            if role != MEAN:
                raise MissingSiteError(
                    f"The {described.tower} tower's layout has no {role!r} role: it is not known what the "
                    f"places of {site} are. Ask for {MEAN!r}."
                )
        return Pooling(None, is_map)
    weights = torch.stack([_mask(layout, role, described.tower) for role in roles], 1).float()
    return Pooling(weights / weights.sum(2, keepdim=True), is_map)


def layout_of(model: Model, inputs: Mapping[str, Any], site: str) -> TokenLayout | None:
    """What the positions of a site are; None where that is not known."""
    tower = model.check_tower(model.check_site(site).tower)
    if model.kind == "diffusion":
        if tower.role != "text" or "prompt" not in inputs:
            return None
        prompt = inputs["prompt"]
        return model.prompt_layout(tower.name, [prompt] if isinstance(prompt, str) else list(prompt))
    needed = dict(inputs)
    if model.kind in ("contrastive", "tower"):
        # The other tower's inputs have no part in where this one's positions are.
        seeing = [one for one in model.towers.values() if one.role == "vision"]
        of_images = {"images", *(name for one in seeing for name in (one.input_name, one.record.grids))}
        needed = {k: v for k, v in inputs.items() if (k in of_images) == (tower.role == "vision")}
    return model.layout(**needed).find(site) if needed else None


def _attended(model: Model, inputs: Mapping[str, Any], tower: str) -> dict[str, Tensor] | None:
    """The positions of texts that come as ids alone, by their attention mask; None of anything else."""
    view = model.check_tower(tower)
    ids = inputs.get(view.input_name)
    if view.role not in ("text", "language") or not isinstance(ids, Tensor) or ids.ndim != 2:
        return None
    mask = inputs.get("attention_mask")
    attended = torch.ones(ids.shape, dtype=torch.bool) if mask is None else mask.bool().cpu()
    last = model.row_positions(inputs, -1, tower).cpu()
    return {MEAN: attended, LAST: torch.nn.functional.one_hot(last, ids.shape[1]).bool()}


def _mask(layout: TokenLayout, role: str, tower: str) -> Tensor:
    attended = ~layout.mask("pad")
    if role == MEAN:
        return attended
    if role == LAST:
        last = attended.long().cumsum(1).argmax(1)
        return torch.nn.functional.one_hot(last, layout.n_pos).bool()
    mask = layout.mask(role)
    if not bool(mask.any()):
        there = ", ".join(dict.fromkeys(r for row in layout.roles for r in row))
        raise MissingSiteError(
            f"The {tower} tower's layout has no {role!r} role: its positions are {there}; {MEAN!r} and "
            f"{LAST!r} are there always."
        )
    if not bool(mask.any(1).all()):
        row = int((~mask.any(1)).nonzero()[0])
        raise InputError(f"Row {row} has no position that is {role!r}; a probe needs one in every row.")
    return mask
