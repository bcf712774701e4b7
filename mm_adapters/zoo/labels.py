"""What a scene shows, as concepts in categories with their pixels: the truth that dissection is held to."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mm_adapters.zoo import world
from mm_adapters.zoo.world import Scene

CATEGORIES: dict[str, tuple[str, ...]] = {
    "shape": world.SHAPES,
    "colour": tuple(world.COLOURS),
    "background": tuple(world.BACKGROUNDS),
    "position": world.POSITIONS,
    "size": world.SIZES,
    "texture": world.TEXTURES,
}
NAMES = tuple(name for names in CATEGORIES.values() for name in names)
MEMBER_OF = tuple(category for category, names in CATEGORIES.items() for _ in names)


def masks_of(one: Scene, size_px: int = 64) -> dict[str, NDArray[np.bool_]]:
    """For each concept the scene shows, which pixels [height, width].

    An object's attributes cover the object; the background's colour covers the rest.
    """
    masks: dict[str, Any] = {}
    covered = world.masks(one, size_px)
    for thing, mask in zip(one.things, covered, strict=True):
        for name in (thing.shape, thing.colour, thing.position, thing.size, thing.texture):
            masks[name] = np.asarray(masks[name] | mask if name in masks else mask)
    masks[one.background] = ~covered.any(0) if len(covered) else np.ones((size_px, size_px), bool)
    return masks


def caption_of(name: str) -> str:
    """A text that says this concept and nothing else, for a judge like tiny-clip."""
    category = MEMBER_OF[NAMES.index(name)]
    phrases = {
        "shape": f"a {name}",
        "background": f"an object on a {name} background",
        "position": f"an object in the {name}",
    }
    return "a photo of " + phrases.get(category, f"{'an' if name[0] in 'aeiou' else 'a'} {name} object")
