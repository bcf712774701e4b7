"""Clean and corrupted inputs that differ in one thing, row by row, and the number that tells them apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mm_adapters import InputError, Model

Metric = Callable[[Any], Tensor]
_SATURATED = 1e-3


@dataclass(frozen=True)
class Pairs:
    """Two inputs of one shape, whose rows belong together, and a metric: the output's number for each row.

    Of a pipeline the inputs hold as many prompts, and the same seeds and options.
    """

    clean: Mapping[str, Any]
    corrupted: Mapping[str, Any]
    metric: Metric


def check_pairs(model: Model, pairs: Sequence[Pairs]) -> None:
    """Raises: InputError unless the two inputs of each pair have the same shape, options and layout."""
    if not pairs:
        raise InputError("There are no pairs: give at least one batch of clean and corrupted inputs.")
    for batch in pairs:
        for key in batch.clean.keys() | batch.corrupted.keys():
            _check_argument(key, batch.clean.get(key), batch.corrupted.get(key))
        one, two = (_roles(model, inputs) for inputs in (batch.clean, batch.corrupted))
        for tower, rows in one.items():
            unlike = [i for i, row in enumerate(rows) if row != two[tower][i]]
            if unlike:
                raise InputError(
                    f"The clean and corrupted inputs differ in what stands where in the {tower} tower, first "
                    f"in row {unlike[0]}: {_first_change(rows[unlike[0]], two[tower][unlike[0]])}. Patching "
                    "goes position by position: give texts of as many tokens, and images of one size."
                )


def check_rows(model: Model, pairs: Sequence[Pairs]) -> None:
    """Raises: InputError unless each row has one image of its own: gradients are summed row by row."""
    views = [view for view in model.towers.values() if view.role == "vision" and not model.loops()]
    for view in views:
        if view.record.packed or view.record.order == "end to end":
            raise InputError(
                f"{view.name}: the patches of all images are packed into positions of one row, so gradients "
                "are no row's own. Score by exact patching (method='exact')."
            )
        for batch in pairs:
            pixels, ids = batch.clean.get(view.input_name), batch.clean.get("input_ids")
            tiled = isinstance(pixels, Tensor) and view.role == "vision" and pixels.ndim > 4
            uneven = isinstance(ids, Tensor) and isinstance(pixels, Tensor) and len(ids) != len(pixels)
            if tiled or (uneven and model.kind == "vlm"):
                raise InputError(
                    f"{view.name}: gradients are summed row by row, which takes one image per row, whole. "
                    "Score by exact patching (method='exact')."
                )


def check_scale(clean: Float[Tensor, " row"], corrupted: Float[Tensor, " row"]) -> None:
    """Raises: InputError for values that leave nothing to attribute: equal, or probabilities at 0 and 1."""
    if not bool((clean != corrupted).any()):
        raise InputError(
            "The metric is the same for the clean and the corrupted inputs: nothing to attribute."
        )
    both = torch.cat([clean, corrupted])
    at_ends = bool((both.sub(both.round()).abs() < _SATURATED).all())
    if at_ends and float(both.min()) >= 0 and float(both.max()) <= 1:
        raise InputError(
            f"The metric lies within {_SATURATED} of 0 or 1 for every row: it is a saturated probability, "
            "whose gradient is nothing. Use logits, or their difference."
        )


def _check_argument(key: str, one: Any, two: Any) -> None:
    if isinstance(one, Tensor) or isinstance(two, Tensor):
        shapes = [tuple(x.shape) if isinstance(x, Tensor) else None for x in (one, two)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"A pair needs two inputs of one shape; {key} is {shapes[0]} in the clean one and "
                f"{shapes[1]} in the corrupted one."
            )
    elif key not in ("prompt", "text") and isinstance(one, int | float | str | list | tuple) and one != two:
        raise InputError(f"A pair differs in what is asked, not in {key}: it is {one!r} and {two!r}.")


def _roles(model: Model, inputs: Mapping[str, Any]) -> dict[str, tuple[tuple[str, ...], ...]]:
    """What stands where in each tower that reads text."""
    if isinstance(prompts := inputs.get("prompt"), str | list | tuple):
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        readers = [name for name, tower in model.towers.items() if tower.role == "text"]
        return {name: model.prompt_layout(name, texts).roles for name in readers}
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor):
        return {}
    mask = inputs.get("attention_mask")
    read = torch.ones_like(ids) if not isinstance(mask, Tensor) or mask.shape != ids.shape else mask
    token = model.record.image_token
    image_id = None if token is None else getattr(getattr(model.wrapped, "config", None), token, None)
    kinds = torch.where(read == 0, 0, torch.where(ids == image_id, 2, 1) if image_id is not None else 1)
    names = ("padding", "a token", "an image's place")
    return {"text": tuple(tuple(names[int(k)] for k in row) for row in kinds)}


def _first_change(one: Sequence[str], two: Sequence[str]) -> str:
    at = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
    here = [row[at] if at < len(row) else "nothing" for row in (one, two)]
    return f"position {at} is {here[0]} in the clean one and {here[1]} in the corrupted one"
