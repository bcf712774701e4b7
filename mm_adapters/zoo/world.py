"""A rendered world whose truth is known: scenes of flat shapes, their images and their masks.

A scene is a pure function of (index, split, seed), so a data set is a seed and a range of numbers,
and nothing has to be stored. Lengths are in units of a 64 x 64 frame whatever the image's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mm_adapters._errors import InputError
from mm_adapters.zoo._shapes import SHAPES, unit_distance

FRAME = 64.0

COLOURS = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (245, 220, 50),
    "green": (45, 160, 65),
    "cyan": (60, 210, 220),
    "blue": (45, 80, 215),
    "purple": (130, 50, 180),
    "pink": (250, 145, 195),
}
BACKGROUNDS = {
    "white": (244, 244, 244),
    "black": (22, 22, 22),
    "gray": (128, 128, 128),
    "brown": (105, 66, 38),
}
SIZES = ("small", "large")
# What each word allows; between them lies what neither says.
RADII = {"small": (6.0, 9.5), "large": (11.0, 14.0)}
TEXTURES = ("solid", "striped", "dotted")
POSITIONS = (
    "top left", "top", "top right",
    "left", "middle", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
RELATIONS = ("left of", "right of", "above", "below")
KINDS = ("one", "two", "many")
SPLITS = ("train", "validation", "test", "novel")
MAX_OBJECTS = 6

# These (shape, colour) pairs appear in the split "novel" and nowhere else.
HELD_OUT_PAIRS = (("heart", "green"), ("star", "purple"), ("cross", "cyan"), ("square", "pink"))

# Centres this far apart (in the frame) count as left of, right of, above, below.
_APART = 12.0


@dataclass(frozen=True)
class Thing:
    """One object: what it is, where its centre lies, how far it reaches."""

    shape: str
    colour: str
    texture: str
    size: str
    position: str
    x: float
    y: float
    radius: float
    rgb: tuple[int, int, int]


@dataclass(frozen=True)
class Scene:
    """One image's whole truth."""

    kind: str
    background: str
    background_rgb: tuple[int, int, int]
    things: tuple[Thing, ...]


def holds(relation: str, a: Thing, b: Thing) -> bool:
    """Whether `a` stands in `relation` to `b`, by their centres."""
    dx, dy = b.x - a.x, b.y - a.y
    return {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[relation] > _APART


def scene(
    index: int,
    split: str = "train",
    seed: int = 0,
    *,
    kind: str | None = None,
    spurious: float = 0.0,
    solid: bool = False,
    size: str | None = None,
    any_radius: bool = False,
) -> Scene:
    """The scene with this number.

    kind: "one", "two" or "many" objects; None mixes them.
    spurious: how often the background is decided by the first shape instead of by chance, in [0, 1].
    solid: no stripes, no dots. size: that of a single object; None mixes them.
    any_radius: one or two objects as small or as large as their word allows, rather than of two sizes.
    """
    if split not in SPLITS:
        raise InputError(f"scene: no split {split!r}; there is {', '.join(SPLITS)}.")
    if kind is not None and kind not in KINDS:
        raise InputError(f"scene: no kind {kind!r}; there is {', '.join(KINDS)}.")
    rng = np.random.default_rng([index, SPLITS.index(split), seed])
    drawn_kind = ("one", "one", "two", "two", "many")[int(rng.integers(5))]
    kind = kind or drawn_kind
    pairs = [_pair(rng, split) for _ in range(2)]
    textures = ["solid" if solid else _texture(rng) for _ in range(2)]
    background = _choose(rng, BACKGROUNDS)
    if rng.random() < spurious:
        background = tuple(BACKGROUNDS)[SHAPES.index(pairs[0][0]) % len(BACKGROUNDS)]
    background_rgb = _tint(rng, BACKGROUNDS[background])

    places: list[tuple[str, str, float, float, float]]
    if kind == "one":
        places = [_place_one(rng, size)]
    elif kind == "two":
        while pairs[1] == pairs[0]:
            pairs[1] = _pair(rng, split)
        places = _place_two(rng)
    else:
        places = _place_many(rng)
        pairs, textures = [pairs[0]] * len(places), [textures[0]] * len(places)

    rgbs = {colour: _tint(rng, COLOURS[colour]) for _, colour in pairs}
    if any_radius and kind != "many":
        places = [(*place[:4], float(rng.uniform(*RADII[place[0]]))) for place in places]
    things = tuple(
        Thing(shape, colour, texture, size, position, x, y, radius, rgbs[colour])
        for (shape, colour), texture, (size, position, x, y, radius) in zip(
            pairs, textures, places, strict=False
        )
    )
    return Scene(kind, background, background_rgb, things)


def thing(
    shape: str,
    colour: str,
    *,
    position: str = "middle",
    size: str = "large",
    texture: str = "solid",
) -> Thing:
    """An object exactly in the middle of its place: for scenes made by hand."""
    cell, step = POSITIONS.index(position), 15.0 if size == "large" else 18.0
    x, y = 32.0 + step * (cell % 3 - 1), 32.0 + step * (cell // 3 - 1)
    radius = 13.25 if size == "large" else 7.75
    return Thing(shape, colour, texture, size, position, x, y, radius, COLOURS[colour])


def by_hand(background: str, *things: Thing) -> Scene:
    """A scene of these objects."""
    alike = len({(t.shape, t.colour) for t in things}) == 1
    kind = "one" if len(things) == 1 else "many" if alike else "two"
    return Scene(kind, background, BACKGROUNDS[background], things)


def render(one: Scene, size_px: int = 64) -> NDArray[np.uint8]:
    """The scene's image, [height, width, rgb]."""
    return render_batch([one], size_px)[0]


def render_batch(scenes: Sequence[Scene], size_px: int = 64) -> NDArray[np.uint8]:
    """The images of many scenes, [scene, height, width, rgb], antialiased."""
    canvas = np.array([s.background_rgb for s in scenes], np.float32)[:, None, None, :]
    canvas = np.broadcast_to(canvas, (len(scenes), size_px, size_px, 3)).copy()
    owner, things = _flatten(scenes)
    if not things:
        return np.round(canvas).astype(np.uint8)
    distance_px = _distances(things, size_px) * (size_px / FRAME)
    cover = np.clip(0.5 - distance_px, 0.0, 1.0)[..., None]
    # Objects never overlap, so adding what each changes is the same as painting in turn.
    change = (
        _paint(things, size_px) - np.array([s.background_rgb for s in scenes], np.float32)[owner, None, None]
    )
    change *= cover
    for row, number in enumerate(owner.tolist()):
        canvas[number] += change[row]
    return np.round(np.clip(canvas, 0, 255)).astype(np.uint8)


def masks(one: Scene, size_px: int = 64) -> NDArray[np.bool_]:
    """Which pixels each object covers, [object, height, width]."""
    return _distances(list(one.things), size_px) <= 0.0


def index_map(one: Scene, size_px: int = 64) -> NDArray[np.uint8]:
    """Which object each pixel shows, [height, width]; 0 is background, i + 1 is object i."""
    out = np.zeros((size_px, size_px), np.uint8)
    for number, mask in enumerate(masks(one, size_px), start=1):
        out[mask] = number
    return out


def shape_mask(shape: str, x: float, y: float, radius: float, size_px: int = 64) -> NDArray[np.bool_]:
    """Which pixels a shape at this place covers, [height, width]: a template to compare with."""
    template = Thing(shape, "red", "solid", "large", "middle", x, y, radius, COLOURS["red"])
    return _distances([template], size_px)[0] <= 0.0


# ---- drawing lots ------------------------------------------------------------------------------


def _choose(rng: np.random.Generator, options: Sequence[str] | dict[str, tuple[int, int, int]]) -> str:
    return tuple(options)[int(rng.integers(len(options)))]


def _pair(rng: np.random.Generator, split: str) -> tuple[str, str]:
    if split == "novel":
        return HELD_OUT_PAIRS[int(rng.integers(len(HELD_OUT_PAIRS)))]
    while True:
        pair = (_choose(rng, SHAPES), _choose(rng, COLOURS))
        if pair not in HELD_OUT_PAIRS:
            return pair


def _texture(rng: np.random.Generator) -> str:
    return TEXTURES[int(np.searchsorted((0.6, 0.8), rng.random(), side="right"))]


def _tint(rng: np.random.Generator, rgb: tuple[int, int, int]) -> tuple[int, int, int]:
    r, g, b = (int(np.clip(c + rng.integers(-8, 9), 0, 255)) for c in rgb)
    return (r, g, b)


def _radius(rng: np.random.Generator, size: str) -> float:
    return float(rng.uniform(12.5, 14.0) if size == "large" else rng.uniform(7.0, 8.5))


def _place_one(rng: np.random.Generator, size_wanted: str | None) -> tuple[str, str, float, float, float]:
    size, cell = _choose(rng, SIZES), int(rng.integers(9))
    size = size_wanted or size
    step = 15.0 if size == "large" else 18.0
    x = 32.0 + step * (cell % 3 - 1) + rng.uniform(-2, 2)
    y = 32.0 + step * (cell // 3 - 1) + rng.uniform(-2, 2)
    return size, POSITIONS[cell], float(x), float(y), _radius(rng, size)


def _place_two(rng: np.random.Generator) -> list[tuple[str, str, float, float, float]]:
    vertical, flipped, lane = bool(rng.integers(2)), bool(rng.integers(2)), int(rng.integers(3))
    places = []
    for end in (2, 0) if flipped else (0, 2):
        size = _choose(rng, SIZES)
        column, row = (lane, end) if vertical else (end, lane)
        x = 32.0 + 16.0 * (column - 1) + rng.uniform(-1, 1)
        y = 32.0 + 16.0 * (row - 1) + rng.uniform(-1, 1)
        places.append((size, POSITIONS[3 * row + column], float(x), float(y), _radius(rng, size)))
    return places


def _place_many(rng: np.random.Generator) -> list[tuple[str, str, float, float, float]]:
    cells = rng.permutation(9)[: int(rng.integers(2, MAX_OBJECTS + 1))]
    places = []
    for cell in cells.tolist():
        x = 32.0 + 20.0 * (cell % 3 - 1) + rng.uniform(-1.5, 1.5)
        y = 32.0 + 20.0 * (cell // 3 - 1) + rng.uniform(-1.5, 1.5)
        places.append(("small", POSITIONS[cell], float(x), float(y), float(rng.uniform(7.0, 8.0))))
    return places


# ---- painting ----------------------------------------------------------------------------------


def _flatten(scenes: Sequence[Scene]) -> tuple[NDArray[np.int64], list[Thing]]:
    owner = np.array([i for i, s in enumerate(scenes) for _ in s.things], np.int64)
    return owner, [thing for s in scenes for thing in s.things]


def _offsets(things: Sequence[Thing], size_px: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Each pixel centre seen from each object's centre, [object, 1, width] and [object, height, 1]."""
    pixel = ((np.arange(size_px) + 0.5) * (FRAME / size_px)).astype(np.float32)
    x = pixel[None, None, :] - np.array([t.x for t in things], np.float32)[:, None, None]
    y = pixel[None, :, None] - np.array([t.y for t in things], np.float32)[:, None, None]
    return x, y


def _distances(things: Sequence[Thing], size_px: int) -> NDArray[np.float32]:
    """Signed distance to each object's edge, negative inside, [object, height, width], in the frame."""
    x, y = _offsets(things, size_px)
    radius = np.array([t.radius for t in things], np.float32)[:, None, None]
    out = np.empty((len(things), size_px, size_px), np.float32)
    for shape in {t.shape for t in things}:
        rows = [i for i, t in enumerate(things) if t.shape == shape]
        unit = unit_distance(shape, x[rows] / radius[rows], y[rows] / radius[rows])
        out[rows] = unit * radius[rows]
    return out


def _paint(things: Sequence[Thing], size_px: int) -> NDArray[np.float32]:
    """Each object's colour at each pixel, [object, height, width, rgb]."""
    x, y = _offsets(things, size_px)
    rgb = np.array([t.rgb for t in things], np.float32)[:, None, None, :]
    out = np.broadcast_to(rgb, (len(things), size_px, size_px, 3)).copy()
    wave = np.float32(2 * np.pi / 5.0)
    striped = [i for i, t in enumerate(things) if t.texture == "striped"]
    dark = np.clip(0.5 + 1.5 * np.sin(wave * x[striped]), 0, 1)
    out[striped] *= 1 - 0.5 * dark[..., None]
    dotted = [i for i, t in enumerate(things) if t.texture == "dotted"]
    peaks = np.cos(wave * x[dotted]) + np.cos(wave * y[dotted])
    light = 0.65 * np.clip(0.5 + 2.5 * (peaks - 0.7), 0, 1)[..., None]
    out[dotted] += light * (255.0 - out[dotted])
    return out
