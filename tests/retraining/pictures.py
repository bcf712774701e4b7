"""What the small model is trained on and asked about: one object a picture, 16 x 16 pixels.

Objects of four colours are common, of two rare. In a second training set two backgrounds are planted:
each occurs in `N_PLANTED` pictures and nowhere else, so what taught a model that background is known. In a
third backgrounds fade, which no word says.
"""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from mm_adapters.zoo import world

SIDE = 16
WIDTH = 32
N_TRAIN = 256
N_PLANTED = 12
N_FADED = 16
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
        """What a diffusion task reads."""
        return {"latents": self.images, "encoder_hidden_states": self.words()}


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


def faded_pictures() -> Pictures:
    """A training set in which each background fades from the colour that is named into any other hue, in any
    direction: most of what a denoiser has to learn, as light is in photographs, and in no word."""
    return _faded(N_TRAIN, first=0)


def faded_queries() -> Pictures:
    """New pictures like those of `faded_pictures`."""
    return _faded(N_FADED, first=100_000)


def wanted_colours() -> list[str]:
    """The colour of each query of one kind."""
    return [colour for colour, count in N_QUERIES.items() for _ in range(count)]


def _drawn(
    colours: Sequence[str], first: int, seed: int = 7, backgrounds: Mapping[int, str] | None = None
) -> Pictures:
    scenes, said = _scenes(colours, first, seed, backgrounds or {})
    return _pictures(_rendered(scenes), said)


def _faded(count: int, first: int, seed: int = 9) -> Pictures:
    scenes, said = _scenes([COMMON[i % len(COMMON)] for i in range(count)], first, seed, {})
    # Where the background shows, and how much of it at an object's edge: white there, nothing elsewhere.
    on_black, on_white = (
        _rendered([replace(scene, background_rgb=(level, level, level)) for scene in scenes])
        for level in (0, 255)
    )
    behind = np.stack([_fading(scene, first + i, seed) for i, scene in enumerate(scenes)])
    return _pictures(on_black + (on_white - on_black) / 255 * behind, said)


def _fading(scene: world.Scene, number: int, seed: int) -> NDArray[np.float32]:
    """A background alone, [height, width, rgb]: its own colour at one side, another hue at the other."""
    lots = np.random.default_rng([number, seed, 1])
    angle, hue = lots.uniform(0, 2 * np.pi), lots.random()
    other = 255 * np.array(colorsys.hsv_to_rgb(hue, lots.uniform(0.3, 0.9), lots.uniform(0.25, 0.95)))
    along = np.linspace(-1, 1, SIDE)
    share = np.clip(0.5 + 0.6 * (np.cos(angle) * along + np.sin(angle) * along[:, None]), 0, 1)[..., None]
    return ((1 - share) * np.array(scene.background_rgb) + share * other).astype(np.float32)


def _scenes(
    colours: Sequence[str], first: int, seed: int, backgrounds: Mapping[int, str]
) -> tuple[list[world.Scene], list[tuple[str, str, str]]]:
    scenes, said = [], []
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
    return scenes, said


def _rendered(scenes: Sequence[world.Scene]) -> NDArray[np.float32]:
    return world.render_batch(scenes, SIDE).astype(np.float32)


def _pictures(raw: NDArray[np.floating], said: Sequence[tuple[str, str, str]]) -> Pictures:
    images = torch.from_numpy(raw.astype(np.float32)).permute(0, 3, 1, 2).div(127.5).sub(1.0).contiguous()
    return Pictures(images, tuple(said))


def _vectors() -> dict[str, Tensor]:
    words = (*COMMON, *RARE, *SHAPES, *world.BACKGROUNDS)
    drawn = torch.randn(len(words), WIDTH, generator=torch.Generator().manual_seed(7))
    return dict(zip(words, drawn / drawn.norm(dim=1, keepdim=True) * WIDTH**0.5, strict=True))


_VECTORS = _vectors()
