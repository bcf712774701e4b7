"""How far each point lies from the edge of each of the world's shapes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mm_adapters._errors import InputError

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")


def unit_distance(shape: str, x: NDArray[np.float32], y: NDArray[np.float32]) -> NDArray[np.floating]:
    """Signed distance (exact near the edge) to the shape of radius 1 at the origin; y points down."""
    if shape == "circle":
        return np.hypot(x, y) - 0.95
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.74) - 0.24
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.83
    if shape == "diamond":
        long, wide = 1.05, 0.68
        return (np.abs(x) * long + np.abs(y) * wide - long * wide) / np.hypot(long, wide)
    if shape == "cross":
        ax, ay = np.abs(x), np.abs(y)
        return np.minimum(np.maximum(ax - 0.98, ay - 0.32), np.maximum(ax - 0.32, ay - 0.98))
    if shape == "triangle":
        side = np.abs(x) * np.cos(np.pi / 6) - (y - 0.25) * np.sin(np.pi / 6)
        return np.maximum(side, y - 0.25) - 0.58
    if shape == "star":
        return _star(x, y)
    if shape == "heart":
        # A square on its corner with a half disc on each of its two upper sides.
        h, lower = 0.8, 0.1
        square = (np.abs(x) + np.abs(y - lower) - h) * np.sqrt(0.5)
        discs = np.hypot(np.abs(x) - h / 2, y - lower + h / 2) - h * np.sqrt(0.5)
        return np.minimum(square, discs)
    raise InputError(f"no shape {shape!r}; there is {', '.join(SHAPES)}.")


def _star(x: NDArray[np.float32], y: NDArray[np.float32]) -> NDArray[np.floating]:
    """Five points: fold the plane to half a point, then measure to that one edge."""
    outer, inner, half = 1.1, 0.46, np.pi / 5
    length = np.hypot(x, y - 0.05)
    angle = np.abs((np.arctan2(x, 0.05 - y) + half) % (2 * half) - half)
    px, py = length * np.cos(angle), length * np.sin(angle)
    ex, ey = inner * np.cos(half) - outer, inner * np.sin(half)
    return ((px - outer) * ey - py * ex) / np.hypot(ex, ey)
