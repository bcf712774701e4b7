"""Pairs of scenes that differ in one thing, with captions that say it: the hardest negatives there are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from mm_adapters.zoo import world
from mm_adapters.zoo.captions import VALUES, Claim, phrase_of
from mm_adapters.zoo.world import Scene, Thing, holds

_CHANCES = {"position": 0.35, "shape": 0.3, "colour": 0.1, "size": 0.1, "texture": 0.1, "background": 0.05}


def pair(scene: Scene, rng: np.random.Generator) -> tuple[Scene, Scene, Claim, Claim]:
    """The scene, its twin, and a claim about each that is false of the other."""
    if scene.kind == "two":
        return _pair_of_two(scene, rng)
    if scene.kind == "many":
        return _pair_of_many(scene, rng)
    changed = tuple(_CHANCES)[int(rng.choice(len(_CHANCES), p=list(_CHANCES.values())))]
    twin = scene
    while twin is scene:
        twin = _change_one(scene, changed, rng)
    named = [name for name in VALUES if name == changed or rng.random() < 0.2]
    ground = changed == "background" or rng.random() < 0.2
    first, second = (
        Claim((phrase_of(s.things[0], named),), None, None, s.background if ground else None)
        for s in (scene, twin)
    )
    return scene, twin, first, second


def _change_one(scene: Scene, changed: str, rng: np.random.Generator) -> Scene:
    """The scene with another value there; the scene itself where that would be a held-out pair."""
    thing = scene.things[0]
    if changed == "background":
        ground = _other(world.BACKGROUNDS, scene.background, rng)
        return replace(scene, background=ground, background_rgb=world.BACKGROUNDS[ground])
    new = _other(dict.fromkeys(VALUES[changed]), getattr(thing, changed), rng)
    if changed == "colour":
        thing = replace(thing, colour=new, rgb=world.COLOURS[new])
    elif changed in ("position", "size"):
        kept = {"position": thing.position, "size": thing.size, changed: new}
        old = world.thing(thing.shape, thing.colour, position=thing.position, size=thing.size)
        middle = world.thing(thing.shape, thing.colour, **kept)
        x, y = middle.x + thing.x - old.x, middle.y + thing.y - old.y
        radius = thing.radius if changed == "position" else middle.radius
        thing = replace(thing, x=x, y=y, radius=radius, position=kept["position"], size=kept["size"])
    else:
        thing = replace(thing, **{changed: new})
    if (thing.shape, thing.colour) in world.HELD_OUT_PAIRS:
        return scene
    return replace(scene, things=(thing,))


def _pair_of_two(scene: Scene, rng: np.random.Generator) -> tuple[Scene, Scene, Claim, Claim]:
    a, b = scene.things
    swapped = (replace(a, colour=b.colour, rgb=b.rgb), replace(b, colour=a.colour, rgb=a.rgb))
    seen_before = all((t.shape, t.colour) not in world.HELD_OUT_PAIRS for t in swapped)
    by_colour = a.colour != b.colour and seen_before and rng.random() < 0.7
    if not by_colour:
        swapped = (_moved(a, b), _moved(b, a))
    twin = replace(scene, things=swapped)
    order = (0, 1) if rng.random() < 0.5 else (1, 0)
    ground = scene.background if rng.random() < 0.2 else None
    joined = by_colour and a.shape != b.shape and rng.random() < 0.2
    claims = []
    for s in (scene, twin):
        first, second = (s.things[i] for i in order)
        relation = "and" if joined else next(r for r in world.RELATIONS if holds(r, first, second))
        phrases = (phrase_of(first, ["colour", "shape"]), phrase_of(second, ["colour", "shape"]))
        claims.append(Claim(phrases, relation, None, ground))
    return scene, twin, claims[0], claims[1]


def _pair_of_many(scene: Scene, rng: np.random.Generator) -> tuple[Scene, Scene, Claim, Claim]:
    named = [name for name in ("colour", "shape") if rng.random() < 0.6]
    things, old = scene.things, scene.things[0]
    if len(things) > 2:
        twin = replace(scene, things=things[:-1])
    else:
        twin = scene
        while twin is scene:
            shape = _other(dict.fromkeys(world.SHAPES), old.shape, rng)
            if (shape, old.colour) not in world.HELD_OUT_PAIRS:
                twin = replace(scene, things=tuple(replace(t, shape=shape) for t in things))
        named = ["shape"]
    first, second = (
        Claim((phrase_of(s.things[0], named),), None, len(s.things), None) for s in (scene, twin)
    )
    return scene, twin, first, second


def _moved(thing: Thing, to: Thing) -> Thing:
    return replace(thing, x=to.x, y=to.y, position=to.position)


def _other(values: Mapping[str, object], value: str, rng: np.random.Generator) -> str:
    rest = [v for v in values if v != value]
    return rest[int(rng.integers(len(rest)))]
