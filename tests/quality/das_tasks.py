"""What is moved from one run into another, and what the model should say then: two tasks of tiny-llava.

"colour asked": one object, and what its colour is. The source's colour becomes the answer.
"object asked": two objects; the base asks for the colour of one, the source asks where an object of another
picture is, or whether it is there, that has the shape of the base's second one. Which shape is asked about is
moved, what is asked about it is not: the answer is the second object's colour, in the base's own picture. The
source's own answer (all of its last state, moved) is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mm_adapters as mm
from integrations import pyvene as mm_pv
from mm_adapters.zoo import world
from tests.quality.das_questions import Asked, Question, put

# What is asked, with a shape; the first is asked of bases.
TEXTS = {
    "colour": "what colour is the {}?",
    "where": "where is the {}?",
    "is there": "is there a {}?",
}
BASE = "colour"


@dataclass(frozen=True)
class Task:
    """A variable, and where it is looked for: at a prompt's last token, in `rank` directions of `site`."""

    name: str
    site: str
    rank: int


COLOUR = Task("colour asked", "language.blocks.1.hook_resid_post", 8)
# Every prompt ends with the same token: what its first attention writes is all that differs between prompts
# before the MLP, and unlike their sum it is what a module returns, where pyvene can put it.
OBJECT = Task("object asked", "language.blocks.0.hook_attn_out", 8)
TASKS = {t.name: t for t in (COLOUR, OBJECT)}


@dataclass(frozen=True)
class Pairs:
    """Bases and sources among questions, by number, and what the base should say with the source's value."""

    asked: Asked
    base: Tensor
    source: Tensor
    labels: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Tensor) -> dict[str, Any]:
        """What `align` and `interchange_accuracy` take, of these pairs."""
        labels = [self.labels[int(i)] for i in rows]
        return {
            "base": self.asked.continued(self.base[rows], labels),
            "sources": [self.asked.continued(self.source[rows])],
            "unit_locations": mm_pv.units([0], len(rows)),
            "targets": self.asked.targets(labels),
        }

    def batches(self, size: int = 128) -> Iterator[dict[str, Any]]:
        """All pairs once."""
        return (self.batch(rows) for rows in torch.arange(len(self)).split(size))

    def shuffled_batches(self, n: int, size: int, seed: int) -> Iterator[dict[str, Any]]:
        """`n` batches of pairs drawn in random order, over and over."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.cat(
            [torch.randperm(len(self), generator=generator) for _ in range(n * size // len(self) + 1)]
        )
        return (self.batch(order[i * size : (i + 1) * size]) for i in range(n))

    def with_shuffled_labels(self, seed: int) -> Pairs:
        """The same pairs, with labels of other pairs whose bases ask the same kind of question."""
        rng = np.random.default_rng(seed)
        kinds = np.array([self.asked.questions[int(i)].kind for i in self.base])
        labels = np.array(self.labels, object)
        for kind in np.unique(kinds):
            rows = np.flatnonzero(kinds == kind)
            labels[rows] = labels[rng.permutation(rows)]
        return replace(self, labels=labels.tolist())


def ask(model: mm.HookedModel, task: str, n_scenes: int, split: str, seed: int) -> Asked:
    """The questions of a task about so many scenes."""
    if task == COLOUR.name:
        scenes = [world.scene(i, split, seed, kind="one", solid=True, size="large") for i in range(n_scenes)]
        asked = [
            Question(i, 0, "colour", TEXTS["colour"].format(t.shape), t.colour, t.colour)
            for i, s in enumerate(scenes)
            for t in s.things
        ]
        return put(model, scenes, asked)
    drawn = (world.scene(i, split, seed, kind="two", solid=True) for i in range(3 * n_scenes))
    apart = [
        s
        for s in drawn
        if s.things[0].shape != s.things[1].shape and s.things[0].colour != s.things[1].colour
    ]
    scenes = apart[:n_scenes]
    asked = [
        Question(i, j, kind, TEXTS[kind].format(t.shape), _answer(kind, t), t.shape)
        for i, s in enumerate(scenes)
        for kind in TEXTS
        for j, t in enumerate(s.things)
    ]
    return put(model, scenes, asked)


def _answer(kind: str, thing: world.Thing) -> str:
    return {"colour": thing.colour, "where": thing.position, "is there": "yes"}[kind]


def values(task: str) -> tuple[str, ...]:
    """The values of a task's variable."""
    return tuple(world.COLOURS) if task == COLOUR.name else tuple(world.SHAPES)


def renamed(task: str, seed: int) -> dict[str, str]:
    """Each value's other name: a random order in which no value keeps its own."""
    rng, names = np.random.default_rng(seed), values(task)
    while True:
        order = rng.permutation(len(names))
        if (order != np.arange(len(names))).all():
            return {name: names[i] for name, i in zip(names, order.tolist(), strict=True)}


def pair(
    task: str, asked: Asked, is_known: Tensor, n: int, seed: int, names: Mapping[str, str] | None = None
) -> Pairs:
    """Pairs of questions that the model answers rightly, and so it does the one that the label answers.

    Args:
        task: Its name.
        asked: The questions, in one draw of scenes.
        is_known: Whether the model answers each rightly, [question].
        n: How many pairs.
        seed: Of which are drawn.
        names: For a control task, what each value counts as. None: as itself. The chance of "object asked" is
            then one half, as a base's picture has two objects.
    """
    rng, questions = np.random.default_rng(seed), asked.questions
    at = {(q.scene, q.kind, q.variable): i for i, q in enumerate(questions)}
    usable = [i for i in range(len(questions)) if is_known[i]]
    drawn: list[tuple[int, int, str]] = []
    for _ in range(200 * n):
        base, source = (questions[usable[int(i)]] for i in rng.integers(len(usable), size=2))
        value = source.variable if names is None else names[source.variable]
        if base.scene == source.scene or value == base.variable:
            continue
        label = value
        if task == OBJECT.name:
            moved = at.get((base.scene, base.kind, value))
            if moved is None or base.kind != BASE or source.kind == BASE or not is_known[moved]:
                continue
            label = questions[moved].answer
        drawn.append(
            (at[base.scene, base.kind, base.variable], at[source.scene, source.kind, source.variable], label)
        )
        if len(drawn) == n:
            break
    assert len(drawn) == n, f"{task}: {len(drawn)} of {n} pairs in {len(usable)} questions"
    bases, sources, labels = zip(*drawn, strict=True)
    return Pairs(asked, torch.tensor(bases), torch.tensor(sources), list(labels))
