"""What is said about a scene, as data: a claim can be written out, and checked against any scene.

A training caption mentions a random part of what is true, so that "a circle" and "a small striped
red circle in the top left on a white background" are both familiar to the models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from mm_adapters.zoo.world import (
    BACKGROUNDS,
    COLOURS,
    MAX_OBJECTS,
    POSITIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    Thing,
    holds,
)

PREFIXES = ("", "", "a photo of ", "a picture of ", "an image of ")
NUMBERS = ("one", "two", "three", "four", "five", "six")
NOUNS = ("shape", "object", "thing")
ADJECTIVES = ("size", "texture", "colour")
VALUES: dict[str, tuple[str, ...]] = {
    "size": SIZES,
    "texture": TEXTURES,
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "position": POSITIONS,
}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def value_numbers(thing: Thing) -> list[int]:
    """Which of VALUES an object has, one number for each attribute."""
    return [values.index(getattr(thing, name)) for name, values in VALUES.items()]


@dataclass(frozen=True)
class Phrase:
    """What is said about one object; None is left unsaid."""

    size: str | None = None
    texture: str | None = None
    colour: str | None = None
    shape: str | None = None
    position: str | None = None

    def named(self) -> list[str]:
        """The attributes that are mentioned."""
        return [f.name for f in fields(self) if getattr(self, f.name) is not None]

    def words(self, noun: str = "object", plural: bool = False, order: Sequence[str] = ADJECTIVES) -> str:
        """The noun phrase without an article, its adjectives in this order."""
        noun = self.shape or noun
        if plural:
            noun += "es" if noun == "cross" else "s"
        text = " ".join(word for word in (*(getattr(self, name) for name in order), noun) if word)
        return f"{text} in the {self.position}" if self.position else text


@dataclass(frozen=True)
class Claim:
    """What is said about a scene: one or two phrases, and how they are joined.

    relation: "and" or one of `RELATIONS`, between two phrases. count: exactly how many match.
    """

    phrases: tuple[Phrase, ...]
    relation: str | None = None
    count: int | None = None
    background: str | None = None

    def text(self, prefix: str = "", noun: str = "object", order: Sequence[str] = ADJECTIVES) -> str:
        """The claim in words; `order` is that of the adjectives."""
        if self.count is not None:
            body = f"{NUMBERS[self.count - 1]} {self.phrases[0].words(noun, self.count > 1, order)}"
        else:
            body = f" {self.relation} ".join(_with_article(p.words(noun, False, order)) for p in self.phrases)
        return f"{prefix}{body} on a {self.background} background" if self.background else prefix + body


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def phrase_of(thing: Thing, mention: Sequence[str]) -> Phrase:
    """A phrase that says these attributes of this object."""
    return Phrase(**{name: getattr(thing, name) for name in mention})


def is_true(claim: Claim, scene: Scene) -> bool:
    """Whether the scene is as the claim says; one match among several objects is enough."""
    return bool(truth([scene], [claim])[0, 0])


def truth(scenes: Sequence[Scene], claims: Sequence[Claim]) -> NDArray[np.bool_]:
    """Which claims are true of which scenes, [scene, claim]."""
    things = np.full((len(scenes), MAX_OBJECTS, len(VALUES)), -2, np.int8)
    related = np.zeros((len(scenes), len(RELATIONS) + 1, MAX_OBJECTS, MAX_OBJECTS), bool)
    for i, scene in enumerate(scenes):
        for o, thing in enumerate(scene.things):
            things[i, o] = [values.index(getattr(thing, name)) for name, values in VALUES.items()]
            for other, second in enumerate(scene.things):
                related[i, -1, o, other] = o != other
                for r, relation in enumerate(RELATIONS):
                    related[i, r, o, other] = holds(relation, thing, second)
    claimed = np.full((len(claims), 2, len(VALUES)), -1, np.int8)
    for j, claim in enumerate(claims):
        for p, phrase in enumerate(claim.phrases):
            for a, (name, values) in enumerate(VALUES.items()):
                value = getattr(phrase, name)
                claimed[j, p, a] = -1 if value is None else values.index(value)
    present = things[:, None, None, :, 0] != -2
    claimed_values = claimed[None, :, :, None, :]
    match = ((claimed_values == -1) | (claimed_values == things[:, None, None, :, :])).all(-1) & present

    out = match[:, :, 0].any(-1)
    for j, claim in enumerate(claims):
        if claim.relation is not None:
            r = len(RELATIONS) if claim.relation == "and" else RELATIONS.index(claim.relation)
            pair = match[:, j, 0, :, None] & match[:, j, 1, None, :] & related[:, r]
            out[:, j] = pair.any((1, 2))
        if claim.count is not None:
            out[:, j] = match[:, j, 0].sum(-1) == claim.count
        if claim.background is not None:
            out[:, j] &= np.array([scene.background == claim.background for scene in scenes])
    return out


def caption(scene: Scene, rng: np.random.Generator) -> Claim:
    """A true claim that says a random part of the scene."""
    background = scene.background if rng.random() < 0.35 else None
    if scene.kind == "two" and rng.random() < 0.85:
        order = [0, 1] if rng.random() < 0.5 else [1, 0]
        first, second = (scene.things[i] for i in order)
        named = ["colour", "shape"]
        if rng.random() < 0.25:
            named = [named[int(rng.integers(2))]]
        extra = [name for name in ("size", "texture") if rng.random() < 0.15]
        relation = next(r for r in RELATIONS if holds(r, first, second)) if rng.random() < 0.7 else "and"
        phrases = tuple(phrase_of(thing, [*named, *extra]) for thing in (first, second))
        return Claim(phrases, relation, None, background)
    thing = scene.things[int(rng.integers(len(scene.things)))]
    if scene.kind == "many":
        chances = {"colour": 0.7, "shape": 0.7, "texture": 0.2}
        named = [name for name, chance in chances.items() if rng.random() < chance]
        if not named or rng.random() < 0.8:
            return Claim((phrase_of(thing, named),), None, len(scene.things), background)
        return Claim((phrase_of(thing, named),), None, None, background)
    # One attribute alone as often as several together: prompts of both sorts must work.
    names = list(VALUES)
    n_said = int((0, 1, 1, 1, 2, 2, 3, 3, 4, 5)[int(rng.integers(10))])
    chance = np.array([1.0, 0.6, 1.3, 1.5, 1.0])
    named = [names[i] for i in rng.choice(5, n_said, replace=False, p=chance / chance.sum()).tolist()]
    if not named:
        background = scene.background
    count = 1 if scene.kind == "one" and "position" not in named and rng.random() < 0.1 else None
    return Claim((phrase_of(thing, named),), None, count, background)


def full_caption(scene: Scene, rng: np.random.Generator) -> Claim:
    """A true claim that says nearly all of one object, so that it fits few other images."""
    background = scene.background if rng.random() < 0.8 else None
    named = [name for name in VALUES if rng.random() < 0.8] or ["shape"]
    return Claim((phrase_of(scene.things[0], named),), None, None, background)


def foil(claim: Claim, rng: np.random.Generator) -> Claim:
    """The claim with one thing changed: two colours swapped, a relation turned, a value replaced."""
    changes: list[Claim] = []
    if len(claim.phrases) == 2:
        a, b = claim.phrases
        for name in ("colour", "colour", "shape"):
            if getattr(a, name) != getattr(b, name):
                swapped = (replace(a, **{name: getattr(b, name)}), replace(b, **{name: getattr(a, name)}))
                changes.append(replace(claim, phrases=swapped))
        if claim.relation in OPPOSITE:
            changes.append(replace(claim, relation=OPPOSITE[claim.relation]))
    if claim.count is not None and claim.count > 1:
        near = [n for n in (claim.count - 1, claim.count + 1) if 2 <= n <= MAX_OBJECTS]
        changes += [replace(claim, count=near[int(rng.integers(len(near)))])] * 2
    if claim.background is not None:
        changes.append(replace(claim, background=_other(tuple(BACKGROUNDS), claim.background, rng)))
    which = int(rng.integers(len(claim.phrases)))
    phrase = claim.phrases[which]
    for name in phrase.named():
        changed = replace(phrase, **{name: _other(VALUES[name], getattr(phrase, name), rng)})
        phrases = (*claim.phrases[:which], changed, *claim.phrases[which + 1 :])
        changes.append(replace(claim, phrases=phrases))
    return changes[int(rng.integers(len(changes)))]


def _other(values: tuple[str, ...], value: str, rng: np.random.Generator) -> str:
    rest = [v for v in values if v != value]
    return rest[int(rng.integers(len(rest)))]


def wording(rng: np.random.Generator) -> dict[str, str]:
    """How a claim is put into words this time: keyword arguments of `Claim.text`."""
    return {
        "prefix": PREFIXES[int(rng.integers(len(PREFIXES)))],
        "noun": NOUNS[int(rng.integers(len(NOUNS)))],
    }


def adjectives(rng: np.random.Generator) -> tuple[str, ...]:
    """An order of the adjectives: the usual one half of the time, else any."""
    order = [ADJECTIVES[i] for i in rng.permutation(len(ADJECTIVES))]
    return ADJECTIVES if rng.random() < 0.5 else tuple(order)
