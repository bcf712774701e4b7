"""Rows of unequal length, padded on either side, and each of them by itself."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from torch import Tensor

FAMILIES = ("llava", "gemma3", "qwen2_5_vl", "blip_2")


def ragged(name: str, side: str) -> dict[str, Any]:
    """A family's two rows, of which one is shorter, with the padding on this side."""
    inputs = dict(tiny.CASES[name]().inputs)
    mask = inputs["attention_mask"]
    if bool(mask.all()):  # The second row loses its last two tokens.
        mask = mask.clone()
        mask[1, -2:] = 0
        inputs |= {"attention_mask": mask, "input_ids": inputs["input_ids"].masked_fill(mask == 0, 0)}
    assert len({int(n) for n in mask.sum(1)}) == 2
    if side == "right":
        return inputs
    shifts = (mask.shape[1] - mask.sum(1)).tolist()

    def moved(x: Tensor) -> Tensor:
        return torch.stack([row.roll(n) for row, n in zip(x, shifts, strict=True)])

    return {k: moved(x) if x.shape == mask.shape else x for k, x in inputs.items()}


def alone(inputs: dict[str, Any], row: int) -> dict[str, Any]:
    """One row without padding."""
    mask = inputs["attention_mask"]
    own = {k: x[[row]][:, mask[row].bool()] for k, x in inputs.items() if x.shape == mask.shape}
    rest = {k: x for k, x in inputs.items() if k not in own}
    if "image_grid_thw" in rest:
        sizes = rest["image_grid_thw"].prod(1).tolist()
        rest = {
            "pixel_values": rest["pixel_values"].split(sizes)[row],
            "image_grid_thw": rest["image_grid_thw"][[row]],
        }
    else:
        rest = {k: x[[row]] for k, x in rest.items()}
    return own | rest
