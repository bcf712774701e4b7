"""Pairs of inputs of the zoo's models that differ in one thing, with the metric that tells them apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from methods_multimodal.circuits import Pairs
from methods_multimodal.diffusion import pictures_of
from mm_adapters import Model
from mm_adapters.zoo import measures, world
from mm_adapters.zoo.captions import Claim, phrase_of
from mm_adapters.zoo.questions import Question
from mm_adapters.zoo.world import Scene

KINDS = ("colour", "shape", "where", "how many")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")


@dataclass(frozen=True)
class Twin:
    """A scene and one that differs in one thing, the question about both, and both answers."""

    scene: Scene
    twin: Scene
    asked: str
    answer: str
    other: str


def twins(kind: str, split: str = "test", seed: int = 5, scenes: str = "one") -> Iterator[Twin]:
    """Twins without end; of "how many" they have several alike objects, one of them away in the twin."""
    rng = np.random.default_rng([seed, 3])
    index = 0
    while True:
        scene = world.scene(index, split, seed, kind="many" if kind == "how many" else scenes, solid=True)
        index += 1
        found = _twin(kind, scene, rng)
        if found is not None and (split == "novel" or not _held_out(found.twin)):
            yield found


def llava_pairs(model: Model, kind: str, n: int, *, batch: int = 32, **options: Any) -> list[Pairs]:
    """Batches of twins with prompts of one length; the metric is the logit of the answer less the twin's."""
    tokenizer = model.tokenizer_of("language")

    def first(text: str) -> int:
        return tokenizer(" " + text, add_special_tokens=False)["input_ids"][0]

    chosen: list[Twin] = []
    length = 0
    for twin in twins(kind, **options):
        n_tokens = len(tokenizer(twin.asked)["input_ids"])
        length = length or n_tokens
        if n_tokens == length and first(twin.answer) != first(twin.other):
            chosen.append(twin)
        if len(chosen) == n:
            break
    batches = [chosen[i : i + batch] for i in range(0, n, batch)]
    return [
        _asked(model, some, [first(t.answer) for t in some], [first(t.other) for t in some])
        for some in batches
    ]


def clip_pairs(
    model: Model, side: str, n: int, *, kind: str = "colour", batch: int = 32, **options: Any
) -> list[Pairs]:
    """Batches of scenes with their captions; "image", "text" or "joint" (both) is exchanged for the twin's.

    The metric is the logit of the image with its text, of each row.
    """
    chosen = list(islice(_same_length(model, twins(kind, **options)), n))
    made = []
    for start in range(0, n, batch):
        some = chosen[start : start + batch]
        images = [measures.images_of([t.scene for t in some]), measures.images_of([t.twin for t in some])]
        texts = [[caption(t.scene) for t in some], [caption(t.twin) for t in some]]
        clean = model.prepare(text=texts[0], images=images[0])
        corrupted = model.prepare(text=texts[side != "image"], images=images[side != "text"])
        made.append(Pairs(clean, corrupted, _own_logit))
    return made


def sd_pairs(
    model: Model, kind: str, n: int, *, steps: int = 8, guidance: float = 3.0, **options: Any
) -> list[Pairs]:
    """One pair a batch: a prompt and one with another colour or shape word, from the same noise.

    The metric is linear in the pixels: the picture along the difference of the two, 1 for the clean one less
    0 for the corrupted one, in a unit in which they are 1 apart.
    """
    made = []
    for seed, twin in enumerate(islice(_same_length(model, twins(kind, **options)), n)):
        values = [caption(s) for s in (twin.scene, twin.twin)]
        common = {
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "output_type": "pt",
            "seed": [seed],
        }
        inputs = [{**common, "prompt": [text]} for text in values]
        one, two = (pictures_of(model, model.run(x).output) for x in inputs)
        made.append(Pairs(inputs[0], inputs[1], _along(model, one, two)))
    return made


def _same_length(model: Model, source: Iterator[Twin]) -> Iterator[Twin]:
    """The twins whose captions have as many tokens as their scene's."""
    tokenizer = model.tokenizer_of("text")
    for twin in source:
        lengths = {len(tokenizer(caption(scene))["input_ids"]) for scene in (twin.scene, twin.twin)}
        if len(lengths) == 1:
            yield twin


def _along(model: Model, one: Tensor, two: Tensor) -> Callable[[Any], Tensor]:
    apart = one - two
    scale = apart.square().sum()

    def metric(output: Any) -> Tensor:
        return ((pictures_of(model, output) - two) * apart).flatten(1).sum(1) / scale

    return metric


def _own_logit(output: Any) -> Tensor:
    return output.logits_per_image.diagonal()


def _asked(model: Model, some: list[Twin], answers: list[int], others: list[int]) -> Pairs:
    prompts = [Question("", t.asked, "").prompt() for t in some]
    images = [measures.images_of([t.scene for t in some]), measures.images_of([t.twin for t in some])]
    clean, corrupted = (model.prepare(text=prompts, images=x) for x in images)
    return Pairs(clean, corrupted, LogitDifference(tuple(answers), tuple(others)))


@dataclass(frozen=True)
class LogitDifference:
    """The logit of one token less another's at the last position, of each row."""

    tokens: tuple[int, ...]
    others: tuple[int, ...]

    def __call__(self, output: Any) -> Tensor:
        last = output.logits[:, -1]
        rows = torch.arange(len(last), device=last.device)
        return last[rows, list(self.tokens)] - last[rows, list(self.others)]


def caption(scene: Scene) -> str:
    """A scene with one object, in words: its colour and shape."""
    thing = scene.things[0]
    return Claim((phrase_of(thing, ["colour", "shape"]),), None, None, None).text()


def _held_out(scene: Scene) -> bool:
    return any((t.shape, t.colour) in world.HELD_OUT_PAIRS for t in scene.things)


def _twin(kind: str, scene: Scene, rng: np.random.Generator) -> Twin | None:
    thing, *rest = scene.things
    if any((t.shape, t.colour) == (thing.shape, thing.colour) or t.shape == thing.shape for t in rest) and (
        kind != "how many"
    ):
        return None
    if kind == "colour":
        new = _other(tuple(world.COLOURS), thing.colour, rng)
        if any(t.colour in (thing.colour, new) for t in rest):
            return None
        changed = replace(thing, colour=new, rgb=world.COLOURS[new])
        twin = replace(scene, things=(changed, *rest))
        return Twin(scene, twin, f"what colour is the {thing.shape}?", thing.colour, new)
    if kind == "shape":
        new = _other(world.SHAPES, thing.shape, rng)
        if any(t.colour == thing.colour for t in rest):
            return None
        twin = replace(scene, things=(replace(thing, shape=new), *rest))
        return Twin(scene, twin, f"what shape is the {thing.colour} object?", thing.shape, new)
    if kind == "where":
        new = _other(world.POSITIONS, thing.position, rng)
        old, middle = (
            world.thing(thing.shape, thing.colour, position=p, size=thing.size) for p in (thing.position, new)
        )
        x, y = middle.x + thing.x - old.x, middle.y + thing.y - old.y
        twin = replace(scene, things=(replace(thing, x=x, y=y, position=new), *rest))
        return Twin(scene, twin, f"where is the {thing.shape}?", thing.position, new)
    n = len(scene.things)
    if n < 3:
        return None
    twin = replace(scene, things=scene.things[:-1])
    asked = phrase_of(thing, ["shape"]).words(plural=True)
    return Twin(scene, twin, f"how many {asked} are there?", _NUMBERS[n], _NUMBERS[n - 1])


def _other(values: tuple[str, ...], value: str, rng: np.random.Generator) -> str:
    rest = [v for v in values if v != value]
    return rest[int(rng.integers(len(rest)))]
