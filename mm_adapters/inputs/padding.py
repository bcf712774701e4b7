"""On which side a text's padding may stand, so that each row is as it is alone."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mm_adapters.sites.site_map import SiteMap
from mm_adapters.sites.tower_view import TowerView

POSITIONS = "position_ids"


def takes_positions(model: Any) -> bool:
    """Whether a module is told the positions of its tokens, where they do not count from the first."""
    return POSITIONS in inspect.signature(type(model).forward).parameters


def is_encoder_decoder(model: Any) -> bool:
    """Whether a model's configuration says that an encoder comes before its decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def counts_padding(model: Any, sites: SiteMap) -> bool:
    """Whether a model of texts counts positions from a row's first token, be it padding, unless it is told.

    Its table of positions then starts at its first row. A table with rows before that one (OPT's, RoBERTa's)
    is read by the attention mask or the tokens, so that padding does not count.
    """
    towers = [tower for tower in sites.towers.values() if tower.role in ("language", "text")]
    return takes_positions(model) and any(_has_table(t) and not t.first_position_row for t in towers)


def pads_left(model: Any, sites: SiteMap) -> bool:
    """Whether rows padded at the left are exact in a decoder: `[:, -1]` is then each row's last token.

    They are with rotary positions, with a table that the attention mask is counted for, and with one whose
    positions the model can be told.
    """
    if is_encoder_decoder(model):
        return False
    decoders = [tower for tower in sites.towers.values() if tower.role == "language"]
    return any(
        _is_rotary(t) or (_has_table(t) and (bool(t.first_position_row) or takes_positions(model)))
        for t in decoders
    )


def row_positions(mask: Bool[Tensor, "row token"] | Int[Tensor, "row token"]) -> Int[Tensor, "row token"]:
    """Each token's position: counted from a row's first token, where what comes before is all padding.

    A row with padding after its tokens, or between them, is counted from its first position, as a model does.
    """
    steps = mask.long()
    counted = (steps.cumsum(-1) - 1).clamp(min=0)
    plain = torch.arange(mask.shape[-1], device=mask.device).expand_as(counted)
    only_before = (steps.diff(dim=-1) >= 0).all(-1, keepdim=True)
    return torch.where(only_before, counted, plain)


def is_padded_left(mask: Bool[Tensor, "row token"] | Int[Tensor, "row token"]) -> bool:
    """Whether any row has padding before all its tokens, and none after."""
    return bool((row_positions(mask)[:, -1] != mask.shape[-1] - 1).any())


def _has_table(tower: TowerView) -> bool:
    return tower.record.position is not None and tower.context_length is not None


def _is_rotary(tower: TowerView) -> bool:
    return "attn.hook_rot_q" in (tower.parts.get("blocks") or [{}])[0]
