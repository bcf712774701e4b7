"""Whose word's map is whose: overlap with what was drawn, and with the pixels that change, by kind of word.

`python -m tests.quality.cross_attention --only maps,two,truth` prints the tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from methods_multimodal.core.statistics import iou
from methods_multimodal.cross_attention import masks, rank_agreement, segment, word_changes, word_maps
from methods_multimodal.cross_attention.generation import generate_checked
from methods_multimodal.cross_attention.segmentation import THRESHOLDS
from mm_adapters.zoo import measures, world
from tests.quality.prompts import ATTRIBUTES, one_object, region, regions_by_colour, swap, two_objects
from tests.quality.rows import Row, row

RECIPES = ("mean", "daam", "spread", "relative")
KINDS = (
    "noun", "colour", "size", "position", "background's colour",
    "“background”", "“in”", "“the”", "“on”", "“a”",
)  # fmt: skip
BASELINE = "“in”"
NAN = float("nan")


@dataclass(frozen=True)
class Picture:
    """One drawn prompt: its maps by recipe, [kind, height, width], and where its object is, if anywhere."""

    prompt: int
    draw: int
    scene: world.Scene
    maps: Mapping[str, Tensor]
    image: Tensor
    region: Tensor | None


def words_of(scene: world.Scene) -> list[str]:
    """A prompt's words in the order of `KINDS`."""
    thing = scene.things[0]
    named = [thing.shape, thing.colour, thing.size, thing.position, scene.background]
    return [*named, "background", "in", "the", "on", "a"]


def drawn(
    model: Any,
    cases: Sequence[tuple[world.Scene, str]],
    draws: int,
    options: Mapping[str, Any],
    words: Callable[[world.Scene], list[str]] = words_of,
    shift: int = 0,
    batch: int = 16,
) -> list[Picture]:
    """Each prompt's pictures from so many noises; `shift` gives a prompt the noise of another one."""
    rows = list(product(range(len(cases)), range(draws)))
    pictures: list[Picture] = []
    for start in range(0, len(rows), batch):
        chunk = rows[start : start + batch]
        inputs = {
            **options,
            "prompt": [cases[i][1] for i, _ in chunk],
            "seed": [noise((i + shift) % len(cases), draw) for i, draw in chunk],
            "output_type": "pt",
        }
        shown = [words(cases[i][0]) for i, _ in chunk]
        maps, output = word_maps(model, inputs, words=shown, keep=("head",), spread=True)
        by_recipe = {recipe: maps.at(recipe) for recipe in RECIPES}
        for j, (i, draw) in enumerate(chunk):
            image = output.images[j].float()
            where = region(image)
            own = {recipe: of[j] for recipe, of in by_recipe.items()}
            pictures.append(Picture(i, draw, cases[i][0], own, image, where if where.any() else None))
    return pictures


def noise(prompt: int, draw: int) -> int:
    """The seed of a prompt's noise."""
    return 100_003 * draw + prompt


# ---- overlap with what was drawn ----------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What is chosen on validation prompts: a threshold for each recipe and prior, and the recipe."""

    thresholds: Mapping[str, float]
    chosen: str
    differences: Mapping[str, float]
    mean_region: Tensor

    def marked(self, recipe: str, maps: Tensor, size: tuple[int, int]) -> Tensor:
        return masks(maps, self.thresholds[recipe], size)


def choose(pictures: Sequence[Picture]) -> Settings:
    """The threshold with the best IoU of the noun's map, by recipe; the recipe whose noun beats "in" most."""
    live = [p for p in pictures if p.region is not None]
    regions = torch.stack([p.region for p in live if p.region is not None])
    kind = KINDS.index(BASELINE)
    thresholds, differences = {}, {}
    for recipe in RECIPES:
        noun = segment(torch.stack([p.maps[recipe][0] for p in live]), regions)
        baseline = segment(torch.stack([p.maps[recipe][kind] for p in live]), regions)
        thresholds[recipe] = noun.best
        differences[recipe] = noun.mean_iou(noun.best) - baseline.mean_iou(noun.best)
    mean_region = regions.float().mean(0)
    for name, prior in (("centre", centre(regions.shape[1:])), ("regions", mean_region)):
        thresholds[name] = segment(prior.expand(len(live), -1, -1), regions).best
    chosen = max(differences, key=lambda recipe: differences[recipe])
    return Settings(thresholds, chosen, differences, mean_region)


def centre(size: Sequence[int]) -> Tensor:
    """A map that is highest in the middle of the picture, whatever the prompt."""
    down, across = (torch.linspace(-1, 1, n) for n in size)
    return -(down[:, None] ** 2 + across[None] ** 2)


def size_of(pictures: Sequence[Picture]) -> tuple[int, int]:
    """Height and width of the pictures."""
    height, width = pictures[0].image.shape[-2:]
    return int(height), int(width)


def table_of(pictures: Sequence[Picture], value: Callable[[Picture], float], draws: int) -> list[list[float]]:
    """[prompt][draw]; NaN where there is no picture."""
    n = max(p.prompt for p in pictures) + 1
    table = [[NAN] * draws for _ in range(n)]
    for p in pictures:
        table[p.prompt][p.draw] = value(p)
    return table


def overlap(marked: Tensor, where: Tensor | None) -> float:
    """The IoU of one mask with a region; NaN without a region."""
    return NAN if where is None else float(iou(marked[None], where[None])[0])


def measure_maps(
    model: Any, n: int, n_validation: int, draws: int, options: Mapping[str, Any]
) -> tuple[list[Row | None], dict[str, Any]]:
    """IoU of each kind of word's map with the drawn object, by recipe, beside the nulls."""
    settings = choose(drawn(model, one_object(n_validation, "validation"), 1, options))
    cases = one_object(n, "test")
    pictures = drawn(model, cases, draws, options)
    # Each prompt's noise with another prompt's words: the map of that noun is a map of another object.
    others = {(p.prompt - n // 2) % n: p for p in drawn(model, cases, 1, options, shift=-(n // 2))}
    size = size_of(pictures)

    def of_kind(recipe: str, kind: int) -> Callable[[Picture], float]:
        return lambda p: overlap(settings.marked(recipe, p.maps[recipe][kind][None], size)[0], p.region)

    def of_other(recipe: str) -> Callable[[Picture], float]:
        def value(p: Picture) -> float:
            if p.draw:
                return NAN
            return overlap(settings.marked(recipe, others[p.prompt].maps[recipe][:1], size)[0], p.region)

        return value

    def of_prior(name: str, prior: Tensor) -> Callable[[Picture], float]:
        marked = masks(prior[None], settings.thresholds[name])[0]
        return lambda p: overlap(marked, p.region)

    def any_word(recipe: str) -> Callable[[Picture], float]:
        return lambda p: sum(of_kind(recipe, k)(p) for k in range(len(KINDS))) / len(KINDS)

    def table(value: Callable[[Picture], float]) -> list[list[float]]:
        return table_of(pictures, value, draws)

    everything = torch.ones(size, dtype=torch.bool)
    rows: list[Row | None] = []
    baseline = KINDS.index(BASELINE)
    for recipe in RECIPES:
        at = f"{recipe}, above {settings.thresholds[recipe]:.2f}"
        nulls = {
            BASELINE: table(of_kind(recipe, baseline)),
            "a word of the prompt at random": table(any_word(recipe)),
            "another prompt's noun, the same noise": table(of_other(recipe)),
            "the middle": table(of_prior("centre", centre(size))),
            "where objects are on validation": table(of_prior("regions", settings.mean_region)),
            "everything marked": table(lambda p: overlap(everything, p.region)),
            "nothing marked": table(lambda p: overlap(~everything, p.region)),
        }
        rows.append(row(f"{at}: noun", table(of_kind(recipe, 0)), nulls))
        for kind in range(1, len(KINDS)):
            if kind != baseline:
                null = {BASELINE: nulls[BASELINE]}
                rows.append(row(f"{at}: {KINDS[kind]}", table(of_kind(recipe, kind)), null))
    return rows, {
        "recipes tried": len(RECIPES),
        "thresholds tried": len(THRESHOLDS),
        "noun less “in” on validation": settings.differences,
        "chosen": settings.chosen,
    }


def measure_two(
    model: Any, n: int, n_validation: int, draws: int, options: Mapping[str, Any]
) -> tuple[list[Row | None], dict[str, Any]]:
    """IoU of each of two objects' words with its own object, beside the other object's word."""
    settings = choose(drawn(model, one_object(n_validation, "validation"), 1, options))
    pictures = drawn(model, two_objects(n, "test"), draws, options, _words_of_two)
    regions = [regions_by_colour(p.image, tuple(t.colour for t in p.scene.things)) for p in pictures]
    live = [(p, where) for p, where in zip(pictures, regions, strict=True) if where is not None]
    facts = {"pictures": len(pictures), "that show both colours once": len(live)}
    if not live:
        return [], facts
    size = size_of(pictures)

    def table(value: Callable[[Picture, int, list[Tensor]], float]) -> list[list[float]]:
        """Two values a picture: one for each object."""
        values = [[NAN] * (2 * draws) for _ in range(n)]
        for p, where in live:
            for thing in (0, 1):
                values[p.prompt][2 * p.draw + thing] = value(p, thing, where)
        return values

    def of_word(recipe: str, which: Callable[[int], int]) -> list[list[float]]:
        return table(
            lambda p, thing, where: overlap(
                settings.marked(recipe, p.maps[recipe][which(thing)][None], size)[0], where[thing]
            )
        )

    both = table(lambda p, thing, where: overlap(where[0] | where[1], where[thing]))
    rows = []
    for recipe in RECIPES:
        for name, first in (("noun", 0), ("colour", 2)):
            nulls = {
                f"the other object's {name}": of_word(recipe, lambda thing, first=first: first + 1 - thing),
                "“on”": of_word(recipe, lambda thing: 4),
                "both objects marked": both,
            }
            own = of_word(recipe, lambda thing, first=first: first + thing)
            rows.append(row(f"{recipe}: the object's {name}", own, nulls))
    return rows, facts


def _words_of_two(scene: world.Scene) -> list[str]:
    a, b = scene.things
    return [a.shape, b.shape, a.colour, b.colour, "on"]


# ---- overlap with the pixels that change ---------------------------------------------------------


def measure_truth(
    model: Any, n: int, draws: int, options: Mapping[str, Any], recipes: Sequence[str] = RECIPES
) -> tuple[list[Row | None], dict[str, Any]]:
    """Rank correlation of a word's map with the pixels that change when it is blocked, or replaced."""
    cases = one_object(n, "test")
    pictures = drawn(model, cases, draws, options)
    changes: dict[tuple[int, int], dict[str, Tensor]] = {}
    for p in pictures:
        scene, text = cases[p.prompt]
        seed = noise(p.prompt, p.draw)
        blocked = word_changes(model, text, words_of(scene), seed=seed, options=options).changed
        new = [swap(text, *_replaced(scene, attribute)) for attribute in ATTRIBUTES]
        images = generate_checked(model, [text, *new], seed, [], options)
        moved = (images[1:] - images[0]).square().mean(1).sqrt()
        order = [ATTRIBUTES.index(a) for a in ("shape", "colour", "size", "position", "background")]
        changes[p.prompt, p.draw] = {"blocked": blocked, "replaced": moved[order]}

    def agreement(how: str, kind: int, of: Callable[[Picture], Tensor]) -> list[list[float]]:
        def value(p: Picture) -> float:
            change = changes[p.prompt, p.draw][how][kind]
            return float(rank_agreement(of(p)[None].float(), change[None])[0])

        return table_of(pictures, value, draws)

    size = size_of(pictures)
    baseline = KINDS.index(BASELINE)
    rows: list[Row | None] = []
    for recipe, (how, kinds) in product(recipes, (("blocked", len(KINDS)), ("replaced", len(ATTRIBUTES)))):
        for kind in range(kinds):
            nulls = {
                f"{BASELINE}'s map": agreement(how, kind, lambda p, r=recipe: p.maps[r][baseline]),
                "the middle": agreement(how, kind, lambda p: centre(size)),
                "the drawn object": agreement(how, kind, lambda p: region(p.image)),
            }
            if kind == baseline:
                del nulls[f"{BASELINE}'s map"]
            own = agreement(how, kind, lambda p, r=recipe, k=kind: p.maps[r][k])
            rows.append(row(f"{recipe}, {how}: {KINDS[kind]}", own, nulls))
    for kind in range(len(KINDS)):
        nulls = {} if kind == baseline else {BASELINE: _change_of(pictures, changes, baseline, draws)}
        rows.append(row(f"change of a pixel when blocked: {KINDS[kind]}",
                        _change_of(pictures, changes, kind, draws), nulls))  # fmt: skip
    return rows, {"prompts": n, "noises": draws, "pictures": len(pictures)}


def _change_of(
    pictures: Sequence[Picture],
    changes: Mapping[tuple[int, int], Mapping[str, Tensor]],
    kind: int,
    draws: int,
) -> list[list[float]]:
    return table_of(pictures, lambda p: float(changes[p.prompt, p.draw]["blocked"][kind].mean()), draws)


def _replaced(scene: world.Scene, attribute: str) -> tuple[str, str]:
    """A word and the next value of its attribute."""
    word = measures.value_of(scene, attribute)
    values = measures.values(attribute)
    return word, values[(values.index(word) + 1) % len(values)]
