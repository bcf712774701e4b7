"""What is drawn and judged by the tables on words: prompts of the world, and rules on pixels."""

from __future__ import annotations

import numpy as np
import torch
from scipy.ndimage import label
from torch import Tensor

from methods_multimodal.cross_attention import Case
from mm_adapters.zoo import judges, measures, world
from mm_adapters.zoo.captions import Claim, phrase_of

STEPS, GUIDANCE = 20, 3.0
ATTRIBUTES = ("shape", "colour", "background", "size", "position")
_SMALLEST = 20  # Pixels of an object; less is a fleck.


def one_object(n: int, split: str) -> list[tuple[world.Scene, str]]:
    """Scenes of a split with one object, and a prompt that says all that is judged."""
    scenes = [world.scene(i, split, seed=7, kind="one", solid=True) for i in range(n)]
    said = ["size", "colour", "shape", "position"]
    texts = [Claim((phrase_of(s.things[0], said),), None, None, s.background).text() for s in scenes]
    return list(zip(scenes, texts, strict=True))


def two_objects(n: int, split: str) -> list[tuple[world.Scene, str]]:
    """Scenes with two objects of different colours and shapes, and a prompt that says how they stand."""
    chosen: list[tuple[world.Scene, str]] = []
    index = 0
    while len(chosen) < n:
        scene = world.scene(index, split, seed=7, kind="two", solid=True)
        index += 1
        a, b = scene.things
        if a.colour == b.colour or a.shape == b.shape:
            continue
        relation = next(r for r in world.RELATIONS if world.holds(r, a, b))
        phrases = (phrase_of(a, ["colour", "shape"]), phrase_of(b, ["colour", "shape"]))
        chosen.append((scene, Claim(phrases, relation, None, scene.background).text()))
    return chosen


def region(image: Tensor) -> Tensor:
    """Where a picture, [3, height, width] in 0..1, is not its background: what was drawn."""
    pixels = np.asarray((image.permute(1, 2, 0) * 255).round()).astype(np.float32)
    frame = np.concatenate(
        [
            pixels[:2].reshape(-1, 3),
            pixels[-2:].reshape(-1, 3),
            pixels[:, :2].reshape(-1, 3),
            pixels[:, -2:].reshape(-1, 3),
        ]
    )
    return torch.tensor(np.linalg.norm(pixels - np.median(frame, axis=0), axis=-1) > 60.0)


def regions_by_colour(image: Tensor, colours: tuple[str, ...]) -> list[Tensor] | None:
    """The connected region of each of these colours; None if any of them is not drawn, or twice.

    A region's colour is that of its inner pixels' median, by the nearest of the world's colours.
    """
    pixels = np.asarray((image.permute(1, 2, 0) * 255).round()).astype(np.float32)
    numbered, n = label(region(image).numpy())  # pyright: ignore[reportGeneralTypeIssues]
    by_colour: dict[str, list[Tensor]] = {}
    for i in range(1, n + 1):
        where = numbered == i
        if where.sum() >= _SMALLEST:
            name = judges.nearest(np.median(pixels[where], axis=0), world.COLOURS)
            by_colour.setdefault(name, []).append(torch.tensor(where))
    if any(len(by_colour.get(colour, [])) != 1 for colour in colours):
        return None
    return [by_colour[colour][0] for colour in colours]


def seen(image: Tensor) -> judges.Seen:
    """What the rules say a picture shows."""
    return judges.judge((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def pairs(attribute: str, n: int, split: str = "test") -> list[tuple[Case, world.Scene]]:
    """Prompts that differ in one attribute's word. A case's seed is its number."""
    rng = np.random.default_rng(0)
    out = []
    for i, (scene, text) in enumerate(one_object(n, split)):
        word = measures.value_of(scene, attribute)
        new = str(rng.choice([v for v in measures.values(attribute) if v != word]))
        out.append((Case(text, word, swap(text, word, new), new, i), scene))
    return out


def swap(text: str, word: str, new: str) -> str:
    """The prompt with a word replaced, and its article right."""
    for a in ("a", "an"):
        article = "an" if new[0] in "aeiou" else "a"
        if text.startswith(f"{a} {word} "):
            return f"{article} {new} " + text.removeprefix(f"{a} {word} ")
    return text.replace(f" {word} ", f" {new} ", 1) if f" {word} " in text else text.replace(word, new, 1)
