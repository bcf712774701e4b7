"""Whatever images or texts a user holds, as batches of one tower's own arguments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mm_adapters import InputError, Model, TowerView
from mm_adapters.inputs.images import image_files


def batches(model: Model, tower: TowerView, items: Any, batch_size: int) -> Iterator[Mapping[str, Any]]:
    """Batches of the tower's arguments.

    `items` is prepared (a tensor of all rows, or a mapping of the tower's arguments), one raw item,
    a folder of images, or an iterable of raw items; a tensor among images is prepared pixels.
    """
    if batch_size < 1:
        raise InputError(f"A batch holds at least one row, not {batch_size}.")
    name = tower.input_name
    if isinstance(items, Mapping):
        rows = len(items[name])
        for start in range(0, rows, batch_size):
            yield {k: v[start : start + batch_size] for k, v in items.items()}
    elif isinstance(items, Tensor) and items.ndim != 3:
        for part in items.split(batch_size):
            yield {name: part}
    else:
        raw = iter(_items(items))
        while chunk := list(islice(raw, batch_size)):
            yield prepared(model, tower, chunk)


def prepared(model: Model, tower: TowerView, items: list[Any]) -> dict[str, Any]:
    """The tower's arguments for these raw items."""
    if tower.role != "vision":
        return model.prepare(text=items)
    if isinstance(items[0], Tensor):
        return {tower.input_name: torch.stack(items)}
    return model.prepare(images=items)


def _items(items: Any) -> Iterable[Any]:
    if isinstance(items, str | PathLike):
        path = Path(items)
        return image_files(path) if path.is_dir() else [items]
    if isinstance(items, Image.Image | Tensor):
        return [items]
    if isinstance(items, Iterable):
        return items
    raise InputError(f"Images or texts were expected, and {type(items).__name__} was given.")
