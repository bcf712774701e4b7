"""What is in a picture, by exact rules on its pixels: the judge that no model had a part in."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from mm_adapters.zoo import paint, world

_NOT_BACKGROUND = 60.0
# So far from the ground a pixel is of some object.
_APART = 40.0
# What is nearer than this to an object is part of it: stripes fall apart, and drawn edges fray.
_GAP_PX = 1
_SMALLEST_PX = 20


@dataclass(frozen=True)
class Seen:
    """What the rules say of a picture with one object; "" where they find none."""

    shape: str
    colour: str
    background: str
    position: str
    size: str


@dataclass(frozen=True)
class Object:
    """One object among those that a picture shows; x and y are of its middle."""

    shape: str
    colour: str
    texture: str
    size: str
    x: float
    y: float


def objects(image: NDArray[np.uint8]) -> list[Object]:
    """What stands apart from the ground of a 64 x 64 picture, [height, width, rgb], the largest first.

    Its settings were chosen on scenes of the split "validation", as rendered and as tiny-sd's autoencoder
    gives them back.
    """
    pixels = image.astype(np.float32)
    ground = _ground(pixels)
    mask = np.linalg.norm(pixels - ground, axis=-1) > _APART
    made: Any = ndimage.label(ndimage.binary_dilation(mask, iterations=_GAP_PX))
    labelled, count = made
    parts = [(labelled == i + 1) & mask for i in range(count)]
    parts = sorted((p for p in parts if p.sum() >= _SMALLEST_PX), key=lambda part: -int(part.sum()))
    return [_object(pixels, ground, part) for part in parts]


def _object(pixels: NDArray[np.float32], ground: NDArray[np.float32], mask: NDArray[np.bool_]) -> Object:
    rows, columns = np.nonzero(mask)
    top, bottom, left, right = box(mask)
    x, y = columns + 0.5 - (left + right) / 2, rows + 0.5 - (top + bottom) / 2
    colour, texture, painted = paint.of(pixels[rows, columns], ground, x, y)
    # At an edge paint and ground are mixed: a pixel is the object's if more than half of it is paint.
    towards = painted - ground
    share = ((pixels[rows, columns] - ground) * towards).sum(1) / np.maximum((towards * towards).sum(1), 1.0)
    covered = np.zeros_like(mask)
    covered[rows, columns] = share > 0.5
    if covered.sum() < _SMALLEST_PX:
        covered = mask
    top, bottom, left, right = box(covered)
    size = "large" if max(bottom - top, right - left) / 2 > 9.9 else "small"
    return Object(nearest_shape(covered), colour, texture, size, (left + right) / 2, (top + bottom) / 2)


def _ground(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """The colour of the picture's edge."""
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3)])
    sides = np.concatenate([pixels[:, :2].reshape(-1, 3), pixels[:, -2:].reshape(-1, 3)])
    return np.median(np.concatenate([border, sides]), axis=0)


def judge(image: NDArray[np.uint8]) -> Seen:
    """What a 64 x 64 picture, [height, width, rgb], shows."""
    pixels = image.astype(np.float32)
    ground = _ground(pixels)
    background = nearest(ground, world.BACKGROUNDS)
    mask = np.linalg.norm(pixels - ground, axis=-1) > _NOT_BACKGROUND
    if mask.sum() < 20:
        return Seen("", "", background, "", "")
    # Pixels at the edge are mixtures; those far from the background are the object's own.
    far = np.linalg.norm(pixels - ground, axis=-1)
    inner_pixels = pixels[mask & (far >= np.quantile(far[mask], 0.4))]
    top, bottom, left, right = box(mask)
    x, y = (left + right) / 2, (top + bottom) / 2
    column, row = (int(np.digitize(v, (24.0, 40.0))) for v in (x, y))
    size = "large" if max(bottom - top, right - left) / 2 > 9.9 else "small"
    return Seen(
        shape=nearest_shape(mask),
        colour=nearest(np.median(inner_pixels, axis=0), world.COLOURS),
        background=background,
        position=world.POSITIONS[3 * row + column],
        size=size,
    )


def nearest(rgb: NDArray[np.float32], palette: dict[str, tuple[int, int, int]]) -> str:
    """The palette's colour that is nearest."""
    return min(palette, key=lambda name: float(np.linalg.norm(rgb - np.array(palette[name]))))


def box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """Top, bottom, left, right of what is true; bottom and right are one past the end."""
    # A row or column with a single stray pixel does not count.
    rows, columns = np.flatnonzero(mask.sum(1) >= 2), np.flatnonzero(mask.sum(0) >= 2)
    if len(rows) == 0 or len(columns) == 0:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def nearest_shape(mask: NDArray[np.bool_]) -> str:
    """The shape whose template, at its best size and shift, overlaps the mask most (by IoU)."""
    top, bottom, left, right = box(mask)
    middle_y, middle_x = (top + bottom) / 2, (left + right) / 2
    # Put the middle of the box in the middle of the frame, where the templates are.
    dy, dx = round(32 - middle_y), round(32 - middle_x)
    moved = np.zeros_like(mask)
    ys, xs = np.nonzero(mask)
    ys, xs = ys + dy, xs + dx
    inside = (ys >= 0) & (ys < 64) & (xs >= 0) & (xs < 64)
    moved[ys[inside], xs[inside]] = True
    names, templates = _templates()
    flat = moved.reshape(-1).astype(np.float32)
    shared = templates @ flat
    overlap = shared / (templates.sum(1) + flat.sum() - shared)
    return names[int(overlap.argmax())]


@cache
def _templates() -> tuple[list[str], NDArray[np.float32]]:
    """Every shape at many sizes and small shifts, its box in the middle of the frame."""
    names: list[str] = []
    rows: list[NDArray[np.float32]] = []
    for shape in world.SHAPES:
        for radius in np.arange(6.0, 15.6, 0.5).tolist():
            top, bottom, left, right = box(world.shape_mask(shape, 32.0, 32.0, radius))
            y, x = 64.0 - (top + bottom) / 2, 64.0 - (left + right) / 2
            for shift_y in (-1.0, -0.5, 0.0, 0.5, 1.0):
                for shift_x in (-1.0, -0.5, 0.0, 0.5, 1.0):
                    mask = world.shape_mask(shape, x + shift_x, y + shift_y, radius)
                    names.append(shape)
                    rows.append(mask.reshape(-1).astype(np.float32))
    return names, np.stack(rows)
