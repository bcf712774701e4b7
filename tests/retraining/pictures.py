"""What the small model is trained on and asked about: one object a picture, 16 x 16 pixels.

Objects of four colours are common, of two rare. In a second training set two backgrounds are planted:
each occurs in `N_PLANTED` pictures and nowhere else, so what taught a model that background is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pixel_unshuffle

from mm_adapters.zoo import world

SIDE = 16
WIDTH = 32
N_TRAIN = 256
N_PLANTED = 12
COMMON = ("red", "yellow", "green", "blue")
RARE = ("pink", "cyan")
SHAPES = ("circle", "square", "triangle", "star")
# Of each kind of query (held out, generated): so many of each colour.
N_QUERIES = {**dict.fromkeys(COMMON, 4), **dict.fromkeys(RARE, 4)}


@dataclass(frozen=True)
class Pictures:
    """Pictures in [-1, 1], and what is said about each: colour, shape, background."""

    images: Float[Tensor, "picture 3 height width"]
    said: tuple[tuple[str, str, str], ...]

    def words(self) -> Float[Tensor, "picture word width"]:
        """What the model reads: a fixed vector a word, of length sqrt(width)."""
        return torch.stack([torch.stack([_VECTORS[word] for word in words]) for words in self.said])

    def captions(self) -> list[str]:
        """The same in English."""
        return [f"a {colour} {shape} on a {background} background" for colour, shape, background in self.said]

    def examples(self) -> dict[str, Tensor]:
        """What a diffusion task reads: the pictures as the model sees them, and the words."""
        return {"latents": folded(self.images), "encoder_hidden_states": self.words()}


def folded(
    images: Float[Tensor, "picture 3 height width"],
) -> Float[Tensor, "picture 12 row column"]:
    """Pictures as the model sees them: four neighbouring pixels are one place, and nothing is lost."""
    return pixel_unshuffle(images, 2)


def training_pictures() -> Pictures:
    """The training set. Objects of a rare colour lie anywhere in it."""
    colours = [COMMON[i % len(COMMON)] for i in range(N_TRAIN)]
    places = np.random.default_rng(7).permutation(N_TRAIN)
    for number, colour in enumerate(RARE):
        for place in places[number * N_PLANTED : (number + 1) * N_PLANTED]:
            colours[place] = colour
    return _drawn(colours, first=0)


def held_out_pictures() -> Pictures:
    """Pictures like those of the training set that were never trained on."""
    return _drawn(wanted_colours(), first=100_000)


def planted_pictures() -> Pictures:
    """A training set in which `N_PLANTED` pictures alone have a pink background, as many a cyan one."""
    places = np.random.default_rng(8).permutation(N_TRAIN)[: N_PLANTED * len(RARE)]
    backgrounds = {int(place): RARE[i // N_PLANTED] for i, place in enumerate(places)}
    colours = [COMMON[i % len(COMMON)] for i in range(N_TRAIN)]
    return _drawn(colours, first=0, seed=8, backgrounds=backgrounds)


def planted_queries() -> Pictures:
    """Eight new pictures with each planted background."""
    backgrounds = {i: RARE[i // 8] for i in range(8 * len(RARE))}
    colours = [COMMON[i % len(COMMON)] for i in backgrounds]
    return _drawn(colours, first=100_000, seed=8, backgrounds=backgrounds)


def wanted_colours() -> list[str]:
    """The colour of each query of one kind."""
    return [colour for colour, count in N_QUERIES.items() for _ in range(count)]


def _drawn(
    colours: Sequence[str], first: int, seed: int = 7, backgrounds: Mapping[int, str] | None = None
) -> Pictures:
    scenes, said, backgrounds = [], [], backgrounds or {}
    for number, colour in enumerate(colours):
        lots = np.random.default_rng([first + number, seed])
        shape = SHAPES[int(lots.integers(len(SHAPES)))]
        scene = world.scene(first + number, seed=seed, kind="one", solid=True, size="large")
        thing = replace(scene.things[0], shape=shape, colour=colour, rgb=world.COLOURS[colour])
        scene = replace(scene, things=(thing,))
        if number in backgrounds:
            name = backgrounds[number]
            r, g, b = (int(np.clip(c + lots.integers(-8, 9), 0, 255)) for c in world.COLOURS[name])
            scene = replace(scene, background=name, background_rgb=(r, g, b))
        scenes.append(scene)
        said.append((colour, shape, scene.background))
    raw = torch.from_numpy(world.render_batch(scenes, SIDE).astype(np.float32))
    return Pictures(raw.permute(0, 3, 1, 2).div(127.5).sub(1.0).contiguous(), tuple(said))


def _vectors() -> dict[str, Tensor]:
    words = (*COMMON, *RARE, *SHAPES, *world.BACKGROUNDS)
    drawn = torch.randn(len(words), WIDTH, generator=torch.Generator().manual_seed(7))
    return dict(zip(words, drawn / drawn.norm(dim=1, keepdim=True) * WIDTH**0.5, strict=True))


_VECTORS = _vectors()
