"""What activations are collected from: images, prompts, or dicts of one row's inputs; a batch at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mm_adapters import InputError, Model
from mm_adapters.inputs.images import image_files


def items_of(data: Any) -> Sequence[Any]:
    """The items of `data`: a folder's images in order of name, or the sequence itself.

    Raises: InputError if there are none.
    """
    if isinstance(data, str | Path):
        if not Path(data).is_dir():
            raise InputError(f"data={str(data)!r} is no folder of images. Pass one, or a list of items.")
        return image_files(data)
    if not isinstance(data, Sequence) or not len(data):
        raise InputError("data is a folder of images, or a list of images, prompts or dicts of inputs.")
    return data


def inputs_of(
    model: Model, items: Sequence[Any], numbers: Sequence[int], options: Mapping[str, Any]
) -> dict[str, Any]:
    """One batch of items as a model's inputs.

    An item is a dict of one row's inputs, a text (a prompt), or an image. A model of images and
    texts that is given one side is run with a blank for the other. Each item of a sampling loop
    keeps its own seed, whatever batch it is in.
    """
    first = items[0]
    if isinstance(first, Mapping):
        merged: dict[str, Any] = {k: _stacked([item[k] for item in items]) for k in first}
    elif isinstance(first, str):
        merged = {"text": list(items)}
    else:
        merged = {"images": list(items)}
    if model.record.loop is not None:
        if "images" in merged and "text" not in merged and "prompt" not in merged:
            raise InputError("A pipeline that draws is given prompts, not images.")
        merged["prompt"] = merged.pop("text", merged.get("prompt"))
        merged.setdefault("seed", list(numbers))
        merged = {"output_type": "latent"} | merged
    elif model.record.kind == "contrastive" and "images" in merged and "text" not in merged:
        merged["text"] = ["."]
    elif model.record.kind == "contrastive" and "text" in merged and "images" not in merged:
        merged["images"] = [Image.new("RGB", (64, 64))]
    return merged | dict(options)


def _stacked(values: list[Any]) -> Any:
    return torch.stack(values) if all(isinstance(v, Tensor) for v in values) else values
