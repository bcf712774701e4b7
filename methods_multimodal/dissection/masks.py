"""Masks in files: index maps with a legend, or COCO's JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from methods_multimodal.dissection._coco import read_document
from methods_multimodal.dissection.concepts import Concepts, Mask, Masks
from mm_adapters import InputError
from mm_adapters.inputs.images import open_image
from mm_adapters.store import read_mapping

LEGEND = "legend.json"


def read_masks(where: Path, images: Sequence[Path]) -> tuple[list[Masks], Concepts]:
    """The masks of these images, from a folder of index maps or a COCO file, and all their concepts.

    Raises: InputError naming the file, for an image without masks or of another size than its masks.
    """
    return read_coco(where, images) if where.suffix.lower() == ".json" else read_index_maps(where, images)


def read_index_maps(folder: Path, images: Sequence[Path]) -> tuple[list[Masks], Concepts]:
    """Masks from FOLDER/CATEGORY/NAME.png: each pixel a number that `legend.json` explains.

    The legend is {category: {number: concept}}; numbers it does not list are nothing. With one category
    the maps may lie in FOLDER itself.
    """
    legend = _legend(folder)
    concepts = Concepts(
        tuple(name for names in legend.values() for name in names.values()),
        tuple(category for category, names in legend.items() for _ in names),
    )
    places = [{category: _map_of(folder, category, legend, image) for category in legend} for image in images]
    all_masks: list[Masks] = []
    for image, maps in zip(images, places, strict=True):
        size = _size(image)
        masks: dict[str, Mask] = {}
        for category, path in maps.items():
            numbers = _numbers(path)
            if numbers.shape != (size[1], size[0]):
                raise InputError(
                    f"{path} is {_by(numbers.shape[::-1])} and {image} is {_by(size)}: they must agree."
                )
            for number in np.unique(numbers).tolist():
                if number in legend[category]:
                    masks[legend[category][number]] = numbers == number
        all_masks.append(masks)
    return all_masks, concepts


def read_coco(path: Path, images: Sequence[Path]) -> tuple[list[Masks], Concepts]:
    """Masks from a COCO annotation file, images found by their file names.

    A concept is a COCO category, its category COCO's supercategory. Needs `pycocotools`.
    """
    try:
        from pycocotools.coco import COCO
    except ImportError:
        raise InputError("COCO masks need pycocotools: pip install mm-interp[coco]") from None
    from contextlib import redirect_stdout
    from io import StringIO

    document = read_document(path)
    with redirect_stdout(StringIO()):
        coco: Any = COCO()
        coco.dataset = document
        coco.createIndex()
    kinds = coco.loadCats(coco.getCatIds())
    concepts = Concepts(
        tuple(kind["name"] for kind in kinds), tuple(kind.get("supercategory") or "object" for kind in kinds)
    )
    names = {kind["id"]: kind["name"] for kind in kinds}
    by_file: dict[str, Any] = {}
    for one in document["images"]:
        name = Path(one["file_name"]).name
        if name in by_file:
            raise InputError(f"{path} has two images {name}; images are found by the names of their files.")
        by_file[name] = one
    missing = [image.name for image in images if image.name not in by_file]
    if missing:
        raise InputError(f"{path} has no image {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}.")
    all_masks: list[Masks] = []
    for image in images:
        record = by_file[image.name]
        size = (record["width"], record["height"])
        if _size(image) != size:
            raise InputError(f"{path} says {image.name} is {_by(size)}; {image} is {_by(_size(image))}.")
        masks: dict[str, Mask] = {}
        for annotation in coco.loadAnns(coco.getAnnIds(imgIds=[record["id"]])):
            name = names[annotation["category_id"]]
            mask = coco.annToMask(annotation).astype(bool)
            masks[name] = masks[name] | mask if name in masks else mask
        all_masks.append(masks)
    return all_masks, concepts


def _legend(folder: Path) -> dict[str, dict[int, str]]:
    path = folder / LEGEND
    if not path.is_file():
        raise InputError(
            f"{folder} has no {LEGEND}. It says what the numbers of the maps mean: "
            '{"colour": {"1": "red"}}.'
        )
    legend = read_mapping(path)
    for category, names in legend.items():
        fits = isinstance(names, dict) and all(n.isdecimal() and isinstance(c, str) for n, c in names.items())
        if not fits or not category.strip() or Path(category).name != category:
            raise InputError(f"{path} is not {{category: {{number: concept}}}} in JSON: {category!r}.")
    return {c: {int(n): name for n, name in names.items()} for c, names in legend.items()}


def _map_of(folder: Path, category: str, legend: dict[str, Any], image: Path) -> Path:
    path = folder / category / f"{image.stem}.png"
    if not path.is_file() and len(legend) == 1:
        path = folder / f"{image.stem}.png"
    if not path.is_file():
        raise InputError(f"{image} has no index map {folder / category / f'{image.stem}.png'}.")
    return path


def _numbers(path: Path) -> NDArray[np.int64]:
    """The numbers of an index map, [row, column]."""
    opened = open_image(path)
    with opened:
        if opened.mode not in ("L", "P", "I", "I;16", "1"):
            raise InputError(f"{path} is {opened.mode}: an index map has one number a pixel.")
        return np.array(opened).astype(np.int64)


def _size(image: Path) -> tuple[int, int]:
    with open_image(image) as opened:
        return opened.size


def _by(size: Sequence[int]) -> str:
    return f"{size[0]} x {size[1]}"
