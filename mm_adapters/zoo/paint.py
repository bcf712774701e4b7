"""Which colour and texture an object was painted in, from its pixels: a fit of what `world` paints.

A texture is a paint that goes over into another in a pattern: darker in stripes, lighter in dots. A blur
keeps the pattern's mean and takes from its height, so the height is fitted and the mean is not.
"""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
from numpy.typing import NDArray

from mm_adapters.zoo import world

Floats = NDArray[np.float32]

_WAVE = 2 * np.pi / 5
# Where a pattern may begin, in pixels.
_SHIFTS = np.arange(-2.5, 2.5, 0.5)
# A pattern of less than this share of its height is none, and one has to explain this much more (of 255).
_LEAST_HEIGHT, _PENALTY = 0.25, 3.0
# Of the pixels, those nearest the ground are mixed with it.
_MIXED = 0.4


def of(own: Floats, ground: Floats, x: Floats, y: Floats) -> tuple[str, str, Floats]:
    """Colour, texture, and the paint fitted at each pixel, [pixel, rgb].

    Args:
        own: An object's pixels, [pixel, rgb] in 0 to 255.
        ground: What lies around it, [rgb].
        x: How far right of the object's middle each pixel is, [pixel].
        y: How far below it.
    """
    far = np.linalg.norm(own - ground, axis=-1)
    inner = far >= np.quantile(far, _MIXED)
    best: tuple[float, str, str, Floats] | None = None
    shares = {"solid": np.zeros((1, len(x)), np.float32), "striped": _stripes(x), "dotted": _dots(x, y)}
    for (texture, share), (colour, base) in itertools.product(shares.items(), _colours().items()):
        towards = {"solid": 0 * base, "striped": -0.5 * base, "dotted": 0.65 * (255 - base)}[texture]
        fitted, height = _fitted(own, inner, base, towards, share)
        error = np.linalg.norm(own[inner] - fitted[:, inner], axis=-1).mean(1)
        if texture != "solid":
            error = np.where(height < _LEAST_HEIGHT, np.inf, error + _PENALTY)
        first = int(error.argmin())
        if best is None or error[first] < best[0]:
            best = (float(error[first]), colour, texture, fitted[first])
    assert best is not None
    return best[1:]


def _fitted(
    own: Floats, inner: NDArray[np.bool_], base: Floats, towards: Floats, share: Floats
) -> tuple[Floats, Floats]:
    """The paint for each pattern, [pattern, pixel, rgb], and the pattern's height, [pattern]."""
    mean = share[:, inner].mean(1, keepdims=True)
    along = (own[inner] - base) @ towards / max(float(towards @ towards), 1.0)
    wave = share[:, inner] - mean
    height = np.clip(wave @ along / np.maximum((wave * wave).sum(1), 1e-6), 0, 1)
    at = np.clip(mean + height[:, None] * (share - mean), 0, 1)
    return base + at[..., None] * towards, height


def _stripes(x: Floats) -> Floats:
    """How dark each pixel is for each beginning, [pattern, pixel]."""
    return np.stack([np.clip(0.5 + 1.5 * np.sin(_WAVE * (x + s)), 0, 1) for s in _SHIFTS]).astype(np.float32)


def _dots(x: Floats, y: Floats) -> Floats:
    """How light each pixel is for each beginning, [pattern, pixel]."""
    across = [np.cos(_WAVE * (x + s)) for s in _SHIFTS]
    down = [np.cos(_WAVE * (y + s)) for s in _SHIFTS]
    return np.stack([np.clip(0.5 + 2.5 * (a + b - 0.7), 0, 1) for a in across for b in down]).astype(
        np.float32
    )


@cache
def _colours() -> dict[str, Floats]:
    return {name: np.array(rgb, np.float32) for name, rgb in world.COLOURS.items()}
