"""What the small model is trained on and asked about: one object a picture, 16 x 16 pixels.

Four colours are common. Two are planted: each occurs in `N_PLANTED` training pictures and nowhere else,
so what taught the model that colour is known.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mm_adapters.zoo import world

SIDE = 16
WIDTH = 32
N_TRAIN = 256
N_PLANTED = 12
COMMON = ("red", "yellow", "green", "blue")
PLANTED = ("pink", "cyan")
SHAPES = ("circle", "square", "triangle", "star")
# Of each kind of query (held out, generated): so many of each colour.
N_QUERIES = {**dict.fromkeys(COMMON, 4), **dict.fromkeys(PLANTED, 4)}


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
        return [
            f"a {colour} {shape} on a {background} background" for colour, shape, background in self.said
        ]

    def of_colour(self, colour: str) -> list[int]:
        """The numbers of the pictures with this colour."""
        return [i for i, words in enumerate(self.said) if words[0] == colour]


def training_pictures() -> Pictures:
    """The training set. Planted pictures lie anywhere in it."""
    colours = [COMMON[i % len(COMMON)] for i in range(N_TRAIN)]
    places = np.random.default_rng(7).permutation(N_TRAIN)
    for number, colour in enumerate(PLANTED):
        for place in places[number * N_PLANTED : (number + 1) * N_PLANTED]:
            colours[place] = colour
    return _drawn(colours, first=0)


def held_out_pictures() -> Pictures:
    """Pictures like those of the training set that were never trained on."""
    return _drawn(wanted_colours(), first=100_000)


def wanted_colours() -> list[str]:
    """The colour of each query of one kind."""
    return [colour for colour, count in N_QUERIES.items() for _ in range(count)]


def _drawn(colours: list[str], first: int) -> Pictures:
    scenes, said = [], []
    for number, colour in enumerate(colours):
        lots = np.random.default_rng([first + number, 7])
        shape = SHAPES[int(lots.integers(len(SHAPES)))]
        scene = world.scene(first + number, seed=7, kind="one", solid=True, size="large")
        thing = replace(scene.things[0], shape=shape, colour=colour, rgb=world.COLOURS[colour])
        scenes.append(replace(scene, things=(thing,)))
        said.append((colour, shape, scene.background))
    raw = torch.from_numpy(world.render_batch(scenes, SIDE).astype(np.float32))
    return Pictures(raw.permute(0, 3, 1, 2).div(127.5).sub(1.0).contiguous(), tuple(said))


def _vectors() -> dict[str, Tensor]:
    words = (*COMMON, *PLANTED, *SHAPES, *world.BACKGROUNDS)
    drawn = torch.randn(len(words), WIDTH, generator=torch.Generator().manual_seed(7))
    return dict(zip(words, drawn / drawn.norm(dim=1, keepdim=True) * WIDTH**0.5, strict=True))


_VECTORS = _vectors()
