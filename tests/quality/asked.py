"""Questions about one object of a scene, its pixels, and twins of the scene: what tracing is measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mm_adapters as mm
from methods_multimodal.patching import TokenRoles, answer_logits, token_roles
from mm_adapters.zoo import measures, questions, world

# Apart from those that models were trained, and other tables made, with.
SEED = 20_000


@dataclass(frozen=True)
class Asked:
    """Questions of one kind about scenes: the object meant, its pixels, and a twin with another answer."""

    scenes: tuple[world.Scene, ...]
    twins: tuple[world.Scene, ...]
    questions: tuple[questions.Question, ...]
    wrong: tuple[str, ...]
    objects: Tensor

    def __len__(self) -> int:
        return len(self.scenes)

    def inputs(self, twin: bool = False) -> dict[str, Any]:
        """The model's raw inputs, of the scenes or of their twins."""
        images = measures.images_of(self.twins if twin else self.scenes)
        return {"text": [q.prompt() for q in self.questions], "images": images}

    def part(self, start: int, n: int) -> Asked:
        """Some of them."""
        at = slice(start, start + n)
        return Asked(self.scenes[at], self.twins[at], self.questions[at], self.wrong[at], self.objects[at])


def asked(kind: str, n: int, split: str, *, things: str = "one", seed: int = 0) -> Asked:
    """`n` questions of a kind ("colour", "shape") about scenes of one object, or two.

    The twin differs in what is asked about and in nothing else: the wrong answer is its right one.
    """
    rng = np.random.default_rng([seed, SEED])
    scenes, twins, asks, wrong, objects = [], [], [], [], []
    index = 0
    while len(scenes) < n:
        scene = world.scene(index, split, SEED + seed, kind=things)
        index += 1
        question = questions.ask(kind, scene, rng)
        meant = [i for i, thing in enumerate(scene.things) if getattr(thing, kind) == question.answer]
        twin = None if len(meant) != 1 else changed(scene, meant[0], kind, rng)
        if twin is None:
            continue
        scenes.append(scene)
        twins.append(twin)
        asks.append(question)
        wrong.append(getattr(twin.things[meant[0]], kind))
        objects.append(world.masks(scene)[meant[0]])
    masks = torch.from_numpy(np.array(objects))
    return Asked(tuple(scenes), tuple(twins), tuple(asks), tuple(wrong), masks)


def changed(scene: world.Scene, which: int, kind: str, rng: np.random.Generator) -> world.Scene | None:
    """The scene with another colour or shape of one object, that none of it has; None if there is none."""
    values = world.COLOURS if kind == "colour" else dict.fromkeys(world.SHAPES)
    thing = scene.things[which]
    free = [
        v
        for v in values
        if all(getattr(t, kind) != v for t in scene.things)
        and ((v, thing.colour) if kind == "shape" else (thing.shape, v)) not in world.HELD_OUT_PAIRS
    ]
    if not free:
        return None
    value = free[int(rng.integers(len(free)))]
    new = (
        replace(thing, colour=value, rgb=world.COLOURS[value])
        if kind == "colour"
        else replace(thing, shape=value)
    )
    return replace(scene, things=tuple(new if i == which else t for i, t in enumerate(scene.things)))


def first_tokens(model: mm.HookedModel, words: Sequence[str]) -> list[int]:
    """The first token of each answer; that of each colour and shape is its own."""
    tokenizer = model.tokenizer_of("language")
    return [tokenizer(f" {word}", add_special_tokens=False).input_ids[0] for word in words]


def roles(model: mm.HookedModel, some: Asked, tower: str = "language") -> TokenRoles:
    """The roles, with "text" for all that follows the image."""
    found = token_roles(model, some.inputs(), tower=tower, objects=some.objects)
    if tower != "language":
        return found
    return TokenRoles(found.masks | {"text": found["question"] | found["last"]}, tower)


def gap(model: mm.HookedModel, some: Asked) -> Any:
    """The metric: the right answer's logit less its twin's."""
    right = first_tokens(model, [q.answer for q in some.questions])
    return answer_logits(model, some.inputs(), right, first_tokens(model, some.wrong))


def correct(model: mm.HookedModel, some: Asked) -> Any:
    """The metric: 1 where the likeliest next token begins the right answer, 0 elsewhere."""
    right = torch.tensor(first_tokens(model, [q.answer for q in some.questions]))
    last = model.row_positions(some.inputs())

    def metric(output: Any) -> Tensor:
        logits = output.logits[torch.arange(len(last)), last]
        return (logits.argmax(-1) == right).float()

    return metric
