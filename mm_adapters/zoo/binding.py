"""Pairs of scenes that hold the same attributes, on the other object: what belongs to what.

A model that only notes which words fit somewhere in a picture cannot tell the two apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from mm_adapters.zoo import captions, world
from mm_adapters.zoo.captions import VALUES, Claim, phrase_of
from mm_adapters.zoo.world import Scene, Thing, holds

SWAPPED = {"colour": 0.35, "texture": 0.25, "size": 0.25, "shape": 0.15}
# With these two objects also change places: what stands left of what.
SWAPPED_OR_MOVED = {"position": 0.4, "colour": 0.25, "texture": 0.15, "size": 0.1, "shape": 0.1}
MOSTLY_MOVED = {"position": 0.7, "colour": 0.15, "texture": 0.15}
FORMS = {"single": 0.5, "and": 0.25, "relation": 0.25}
MOSTLY_RELATED = {"relation": 0.7, "single": 0.3}
_MENTIONED = {"shape": 0.85, "colour": 0.5, "size": 0.2, "texture": 0.2, "position": 0.1}
# Which attributes go together; the heads name each combination of their values.
JOINED = (
    ("shape", "colour"),
    ("shape", "texture"),
    ("shape", "size"),
    ("colour", "texture"),
    ("colour", "size"),
)
_RADIUS = {"small": 7.75, "large": 13.25}


def pair(
    scene: Scene,
    rng: np.random.Generator,
    chances: Mapping[str, float] = SWAPPED,
    forms: Mapping[str, float] = FORMS,
) -> tuple[Scene, Scene, Claim, Claim]:
    """A scene of two objects, the same with one attribute swapped, and a claim of each, false of the other.

    `chances` say how often which attribute is, `forms` how often which form of claim.
    """
    while True:
        swapped, form = drawn(chances, rng), drawn(forms, rng)
        first = _with_different(scene, swapped, rng)
        second = crossed(first, swapped)
        if any((t.shape, t.colour) in world.HELD_OUT_PAIRS for s in (first, second) for t in s.things):
            continue
        named = [n for n in VALUES if n == swapped or rng.random() < _MENTIONED[n]]
        if swapped == "position" and form == "relation" and rng.random() < 0.8:
            named.remove("position")  # The relation says it.
        which = int(rng.integers(2))
        claims = [claim_of(s, form, named, which) for s in (first, second)]
        true_of = captions.truth([first, second], claims)
        if not true_of[0, 1] and not true_of[1, 0]:
            return first, second, claims[0], claims[1]


def drawn(chances: Mapping[str, float], rng: np.random.Generator) -> str:
    """One of these, as often as it says."""
    return tuple(chances)[int(rng.choice(len(chances), p=list(chances.values())))]


def crossed(scene: Scene, swapped: str) -> Scene:
    """The scene of two objects, each with the other's colour, texture, size, shape or place."""
    a, b = scene.things
    return replace(scene, things=(_like(a, b, swapped), _like(b, a, swapped)))


def claim_of(scene: Scene, form: str, named: Sequence[str], which: int) -> Claim:
    """What is said of object number `which` alone, or first and of the other then."""
    first, second = scene.things[which], scene.things[1 - which]
    if form == "single":
        return Claim((phrase_of(first, named),))
    relation = "and" if form == "and" else next(r for r in world.RELATIONS if holds(r, first, second))
    return Claim((phrase_of(first, named), phrase_of(second, named)), relation)


def _like(thing: Thing, other: Thing, swapped: str) -> Thing:
    if swapped == "colour":
        return replace(thing, colour=other.colour, rgb=other.rgb)
    if swapped == "size":
        return replace(thing, size=other.size, radius=other.radius)
    if swapped == "position":
        return replace(thing, x=other.x, y=other.y, position=other.position)
    return replace(thing, **{swapped: getattr(other, swapped)})


def _with_different(scene: Scene, name: str, rng: np.random.Generator) -> Scene:
    """The scene, its second object changed where both have the same."""
    a, b = scene.things
    if getattr(a, name) != getattr(b, name):
        return scene
    rest = [value for value in VALUES[name] if value != getattr(b, name)]
    value = rest[int(rng.integers(len(rest)))]
    more = {"colour": {"rgb": world.COLOURS.get(value)}, "size": {"radius": _RADIUS.get(value)}}
    return replace(scene, things=(a, replace(b, **{name: value}, **more.get(name, {}))))


class Heads(nn.Module):
    """Linear heads that name which values belong together, thrown away after training.

    From a patch, those of the object it lies on; from the image's vector, whether an object has both, told
    from pictures in which one has the one and another the other.
    """

    def __init__(self, patch_width: int, image_width: int) -> None:
        super().__init__()
        self.sizes = [len(VALUES[a]) * len(VALUES[b]) for a, b in JOINED]
        self.patch = nn.Linear(patch_width, sum(self.sizes))
        self.image = nn.Linear(image_width, sum(self.sizes))

    def forward(self, image: Tensor, patches: Tensor, scenes: Sequence[Scene]) -> Tensor:
        """How badly they do so, for image [scene, width] and patches [scene, patch, width]."""
        rows, labels = patches_on_objects(scenes, combinations)
        scores = self.patch(patches.flatten(0, 1)[rows.to(patches.device)]).split(self.sizes, -1)
        named = [
            nn.functional.cross_entropy(one, label.to(patches.device))
            for one, label in zip(scores, labels.unbind(1), strict=True)
        ]
        together, apart = (of.to(image.device) for of in joined(scenes))
        bound = nn.functional.softplus(torch.where(together, -1, 1) * self.image(image))
        return torch.stack(named).mean() + bound[together].mean() + bound[apart].mean()


def combinations(thing: Thing) -> list[int]:
    """Which of each combination's values an object has."""
    return [_number(thing, thing, a, b) for a, b in JOINED]


def patches_on_objects(scenes: Sequence[Scene], label: Callable[[Thing], list[int]]) -> tuple[Tensor, Tensor]:
    """Which patches of 8 x 8 pixels lie on an object, [patch], and what it is called, [patch, label]."""
    middle = np.arange(8) * 8.0 + 4.0
    rows, labels = [], []
    for number, scene in enumerate(scenes):
        for thing in scene.things:
            near = np.hypot(middle[None, :] - thing.x, middle[:, None] - thing.y) < thing.radius
            rows += [number * 64 + int(i) for i in np.flatnonzero(near)]
            labels += [label(thing)] * int(near.sum())
    return torch.tensor(rows), torch.tensor(labels)


def joined(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    """Which combinations one object has, and which only two objects have between them, [scene, all]."""
    sizes = [len(VALUES[a]) * len(VALUES[b]) for a, b in JOINED]
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    together, apart = (np.zeros((len(scenes), sum(sizes)), bool) for _ in range(2))
    for i, scene in enumerate(scenes):
        for one in scene.things:
            for other in scene.things:
                which = together if one is other else apart
                for start, (a, b) in zip(starts, JOINED, strict=True):
                    which[i, start + _number(one, other, a, b)] = True
    return torch.from_numpy(together), torch.from_numpy(apart & ~together)


def _number(one: Thing, other: Thing, a: str, b: str) -> int:
    return VALUES[a].index(getattr(one, a)) * len(VALUES[b]) + VALUES[b].index(getattr(other, b))
