"""A COCO annotation file, looked through before anything is made of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mm_adapters import InputError
from mm_adapters.store import read_mapping

_MOST_SIDE = 10**6  # Pixels; more is no picture, and a mask of it would fill the memory.


def read_document(path: Path) -> dict[str, Any]:
    """The images, categories and annotations in a file, each with all that masks are made of.

    Raises: InputError naming the file and the entry that lacks something, or says what cannot be.
    """
    document = read_mapping(path)
    images, kinds, annotations = (
        _entries(path, document, key) for key in ("images", "categories", "annotations")
    )
    sizes: dict[Any, tuple[int, int]] = {}
    for i, one in enumerate(images):
        where = f"{path}, images[{i}]"
        number, _ = _value(where, one, "id", int), _value(where, one, "file_name", str)
        size = _value(where, one, "width", int), _value(where, one, "height", int)
        if not all(0 < side <= _MOST_SIDE for side in size):
            raise InputError(f"{where}: its width and height are {size[0]} and {size[1]}.")
        if number in sizes:
            raise InputError(f"{where}: its id {number} is another image's too.")
        sizes[number] = size
    numbers: set[int] = set()
    for i, one in enumerate(kinds):
        where = f"{path}, categories[{i}]"
        number, _ = _value(where, one, "id", int), _value(where, one, "name", str)
        if not isinstance(one.get("supercategory", ""), str | None):
            raise InputError(f"{where}: its supercategory is {one['supercategory']!r}, and is a name.")
        if number in numbers:
            raise InputError(f"{where}: its id {number} is another category's too.")
        numbers.add(number)
    ids: set[int] = set()
    for i, one in enumerate(annotations):
        where = f"{path}, annotations[{i}]"
        image, kind = _value(where, one, "image_id", int), _value(where, one, "category_id", int)
        number = _value(where, one, "id", int)
        if image not in sizes:
            raise InputError(f"{where} is of the image {image}, which is not listed.")
        if kind not in numbers:
            raise InputError(f"{where} is of the category {kind}, which is not listed.")
        if number in ids:
            raise InputError(f"{where}: its id {number} is another annotation's too.")
        ids.add(number)
        _check_mask(where, one.get("segmentation"), sizes[image])
    return document


def _entries(path: Path, document: dict[str, Any], key: str) -> list[dict[str, Any]]:
    entries = document.get(key)
    if not isinstance(entries, list) or not all(isinstance(one, dict) for one in entries):
        raise InputError(f"{path} has no list of objects {key!r}, so it is no COCO annotation file.")
    return entries


def _value(where: str, entry: dict[str, Any], key: str, kind: type) -> Any:
    value = entry.get(key)
    if not isinstance(value, kind) or isinstance(value, bool) or value == "":
        what = f"has no {key}" if key not in entry else f"has {value!r} for its {key}"
        raise InputError(f"{where} {what}.")
    return value


def _check_mask(where: str, mask: Any, size: tuple[int, int]) -> None:
    width, height = size
    if isinstance(mask, list):
        for polygon in mask:
            if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
                raise InputError(f"{where}: a polygon is a list of at least three x, y pairs.")
            if not all(_is_number(x) and math.isfinite(x) and abs(x) < 10 * _MOST_SIDE for x in polygon):
                raise InputError(f"{where}: a polygon holds what is no finite number.")
        if not mask:
            raise InputError(f"{where}: its segmentation is empty.")
        return
    if not isinstance(mask, dict) or mask.get("size") != [height, width]:
        raise InputError(
            f"{where}: its segmentation is neither polygons nor runs of an image of {width} x {height}."
        )
    counts = mask.get("counts")
    runs = _decoded(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(type(n) is int and n >= 0 for n in runs):
        raise InputError(f"{where}: its runs are no lengths.")
    if sum(runs) != width * height:
        raise InputError(f"{where}: its runs cover {sum(runs)} of {width * height} pixels.")


def _decoded(text: str) -> Sequence[int] | None:
    """The lengths in COCO's compressed runs: five bits a letter, from the third on as differences."""
    runs: list[int] = []
    value = shift = 0
    for letter in text:
        code = ord(letter) - 48
        if not 0 <= code < 64 or shift > 60:
            return None
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            if code & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return None if shift else runs


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
