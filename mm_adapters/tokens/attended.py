"""Where "the last token" of each row stands in a padded batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mm_adapters._errors import InputError


def attended_position(attended: Bool[Tensor, "row pos"], position: int = -1) -> Int[Tensor, " row"]:
    """Where one position of each row stands: -1 is the row's last attended position, -2 the one before it.

    From 0 on it is the position itself, counted over the whole sequence with its padding.

    Raises: InputError if the sequence, or one row's attended part of it, is shorter.
    """
    n_rows, n_pos = attended.shape
    if position >= 0:
        if position >= n_pos:
            raise InputError(f"There is no position {position}: the rows have positions 0 to {n_pos - 1}.")
        return torch.full((n_rows,), position, device=attended.device)
    counted = attended.long().cumsum(1)
    rank = counted[:, -1:] + position + 1
    short = (rank[:, 0] < 1).nonzero()[:, 0].tolist()
    if short:
        length = int(counted[short[0], -1])
        raise InputError(f"There is no position {position}: row {short[0]} attends to {length} positions.")
    return (counted == rank).long().argmax(1)  # Of equal values argmax gives the first.


def attended_of(arguments: Mapping[str, Any], tokens: str) -> Bool[Tensor, "row pos"]:
    """Which positions of the `tokens` argument a model is told to attend to, from its prepared arguments.

    All of them where there is no mask.

    Raises: InputError if there are no tokens, or the mask is not one number for each of them.
    """
    name = tokens.replace("input_ids", "attention_mask")
    ids = arguments.get(tokens)
    if ids is None:
        ids = arguments.get(tokens.replace("input_ids", "inputs_embeds"))
    mask = arguments.get(name) if name != tokens else None
    if not isinstance(ids, Tensor):
        raise InputError(
            f"There is no {tokens} here, so no row has a last position: pass text, or {tokens}=."
        )
    if mask is None:
        return torch.ones(ids.shape[:2], dtype=torch.bool, device=ids.device)
    if not isinstance(mask, Tensor) or mask.shape != ids.shape[:2]:
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(
            f"{name} is {shape} and {tokens} has {list(ids.shape[:2])} positions: where a row ends is read "
            "off one number for each position. Pass such a mask, or count positions from 0."
        )
    return mask.bool()
