"""What the tables on probes are asked: inputs of the world's scenes, and each row's values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import mm_adapters as mm
from mm_adapters.zoo import measures, world
from mm_adapters.zoo.captions import NUMBERS, Claim, phrase_of
from mm_adapters.zoo.world import Scene

# Seeds of scenes of a draw, so that draws share none.
APART = 1000
NOTHING = "nothing"
QUESTION = "<image>\nquestion: what shape is the object? answer:"
N_STEPS = 8
STEPS = (0, 2, 4, 7)
BATCH = 50


@dataclass(frozen=True)
class Asked:
    """Inputs of one sort of scene, each row's values, and what each row is of, for the control task."""

    batches: list[Mapping[str, Any]]
    labels: Mapping[str, list[str]]
    types: list[str]


def scenes_of(kind: str, n: int, draw: int) -> list[Scene]:
    """Scenes of one kind; of two objects those whose colours differ, so that one is the first."""
    chosen: list[Scene] = []
    index = 0
    while len(chosen) < n:
        scene = world.scene(index, "validation", seed=5 + APART * draw, kind=kind)
        index += 1
        if kind != "two" or scene.things[0].colour != scene.things[1].colour:
            chosen.append(scene)
    return chosen


def values_of(kind: str, scenes: Sequence[Scene], draw: int) -> dict[str, list[str]]:
    """Each variable's value in each scene, and a variable that is in none: one of four letters, by lot."""
    if kind == "one":
        values = {name: [measures.value_of(s, name) for s in scenes] for name in measures.ATTRIBUTES}
        lots = np.random.default_rng([draw, 9]).integers(4, size=len(scenes))
        return values | {NOTHING: ["abcd"[i] for i in lots.tolist()]}
    if kind == "many":
        return {"count": [NUMBERS[len(s.things) - 1] for s in scenes]}
    return {"relation": [relation(*in_order(s)) for s in scenes]}


def in_order(scene: Scene) -> tuple[world.Thing, world.Thing]:
    """Two objects, that of the earlier colour first: whose relation to the other is asked about."""
    first, second = sorted(scene.things, key=lambda thing: tuple(world.COLOURS).index(thing.colour))
    return first, second


def relation(a: world.Thing, b: world.Thing) -> str:
    """How one object stands to another."""
    return next(r for r in world.RELATIONS if world.holds(r, a, b))


def types_of(kind: str, scenes: Sequence[Scene]) -> list[str]:
    """What each scene is of: its object's shape and colour, of two objects both colours."""
    if kind == "two":
        return [" ".join(sorted(t.colour for t in s.things)) for s in scenes]
    return [f"{s.things[0].colour} {s.things[0].shape}" for s in scenes]


def caption_of(kind: str, scene: Scene) -> str:
    """A text that says every variable of its sort of scene."""
    if kind == "two":
        first, second = in_order(scene)
        phrases = tuple(phrase_of(thing, ["colour", "shape"]) for thing in (first, second))
        return Claim(phrases, relation(first, second)).text()
    if kind == "many":
        return Claim((phrase_of(scene.things[0], ["colour", "shape"]),), None, len(scene.things)).text()
    said = ["size", "colour", "shape", "position"]
    return Claim((phrase_of(scene.things[0], said),), None, None, scene.background).text()


Inputs = Callable[[str, list[Scene], int], list[Mapping[str, Any]]]


def _parts(items: Sequence[Any]) -> list[list[Any]]:
    return [list(items[i : i + BATCH]) for i in range(0, len(items), BATCH)]


def pictures(kind: str, scenes: list[Scene], draw: int) -> list[Mapping[str, Any]]:
    """Inputs of a vision tower."""
    return [{"images": part} for part in _parts(measures.images_of(scenes))]


def captions(kind: str, scenes: list[Scene], draw: int) -> list[Mapping[str, Any]]:
    """Inputs of a text tower."""
    return [{"text": part} for part in _parts([caption_of(kind, s) for s in scenes])]


def questions(kind: str, scenes: list[Scene], draw: int) -> list[Mapping[str, Any]]:
    """Inputs of a VLM: the same question of every picture, so that its words say nothing of the variables."""
    return [{"images": p, "text": [QUESTION] * len(p)} for p in _parts(measures.images_of(scenes))]


def prompts(kind: str, scenes: list[Scene], draw: int) -> list[Mapping[str, Any]]:
    """Inputs of a pipeline without guidance, each with a noise of its own."""
    return _drawn(kind, scenes, draw, num_inference_steps=N_STEPS)


def _drawn(kind: str, scenes: list[Scene], draw: int, **options: int) -> list[Mapping[str, Any]]:
    texts = [caption_of(kind, s) for s in scenes]
    seeds = [APART * draw + i for i in range(len(texts))]
    return [
        {"prompt": p, "seed": s, "guidance_scale": 1.0, "output_type": "latent", **options}
        for p, s in zip(_parts(texts), _parts(seeds), strict=True)
    ]


def texts_of_prompts(kind: str, scenes: list[Scene], draw: int) -> list[Mapping[str, Any]]:
    """The same for a pipeline's text tower, which is done before the first step: one of a tiny picture."""
    return _drawn(kind, scenes, draw, num_inference_steps=1, height=16, width=16)


def asked(inputs: Inputs, kind: str, n: int, draw: int) -> Asked:
    """Inputs and values of one draw of scenes."""
    scenes = scenes_of(kind, n, draw)
    return Asked(inputs(kind, scenes, draw), values_of(kind, scenes, draw), types_of(kind, scenes))


def untrained(name: str, seed: int) -> mm.HookedModel:
    """The model of the same config with weights drawn anew, by its library's own initialisation."""
    model: Any = mm.load(name)
    pipeline = model.wrapped
    wholes = [pipeline.unet, pipeline.text_encoder] if name == "tiny-sd" else [pipeline]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for whole in wholes:
            kind = type(whole)
            fresh = kind.from_config(whole.config) if hasattr(kind, "from_config") else kind(whole.config)
            whole.load_state_dict(fresh.state_dict())
    return model
