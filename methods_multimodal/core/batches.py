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

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def batches(model: Model, tower: TowerView, given: Any, batch_size: int) -> Iterator[Mapping[str, Any]]:
    """Batches of the tower's arguments.

    `given` is prepared (a tensor of all rows, or a mapping of the tower's arguments), one raw item,
    a folder of images, or an iterable of raw items; a tensor among images is prepared pixels.
    """
    if batch_size < 1:
        raise InputError(f"A batch holds at least one row, not {batch_size}.")
    name = tower.input_name
    if isinstance(given, Mapping):
        rows = len(given[name])
        for start in range(0, rows, batch_size):
            yield {k: v[start : start + batch_size] for k, v in given.items()}
    elif isinstance(given, Tensor) and given.ndim != 3:
        for part in given.split(batch_size):
            yield {name: part}
    else:
        items = iter(_items(given))
        while chunk := list(islice(items, batch_size)):
            yield prepared(model, tower, chunk)


def prepared(model: Model, tower: TowerView, items: list[Any]) -> dict[str, Any]:
    """The tower's arguments for these raw items."""
    if tower.role != "vision":
        return model.prepare(text=items)
    if isinstance(items[0], Tensor):
        return {tower.input_name: torch.stack(items)}
    return model.prepare(images=items)


def image_files(folder: Path) -> list[Path]:
    """The image files in a folder and below it, in order of name. Raises: InputError if it has none."""
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        raise InputError(f"{folder} holds no image: nothing there ends in {', '.join(SUFFIXES)}.")
    return found


def _items(given: Any) -> Iterable[Any]:
    if isinstance(given, str | PathLike):
        path = Path(given)
        return image_files(path) if path.is_dir() else [given]
    if isinstance(given, Image.Image | Tensor):
        return [given]
    if isinstance(given, Iterable):
        return given
    raise InputError(f"Images or texts were expected, and {type(given).__name__} was given.")
