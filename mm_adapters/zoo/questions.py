"""Questions about scenes with one right answer each, mixed so that guessing rarely succeeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mm_adapters.zoo import captions
from mm_adapters.zoo.captions import NUMBERS, Claim, Phrase, phrase_of
from mm_adapters.zoo.world import Scene, scene

# How often each kind of question is asked. "is there" has two answers, so it is asked rarely.
KINDS = {"colour": 0.32, "shape": 0.32, "where": 0.2, "how many": 0.1, "is there": 0.06}
_SCENES = {
    "colour": ("one", "two", "two", "many"),
    "shape": ("one", "two", "two", "many"),
    "where": ("one", "one", "two"),
    "how many": ("one", "many", "many", "many", "many", "many"),
    "is there": ("one", "two", "two"),
}


@dataclass(frozen=True)
class Question:
    """A question in words, its one right answer, and its kind (a key of `KINDS`)."""

    kind: str
    text: str
    answer: str

    def prompt(self) -> str:
        """What tiny-llava is given; its answer follows."""
        return f"<image>\n{self.asked()}"

    def asked(self) -> str:
        """The prompt without the image."""
        return f"question: {self.text} answer:"


def question(index: int, split: str = "train", seed: int = 0) -> tuple[Scene, Question]:
    """The question with this number and the scene it is about."""
    rng = np.random.default_rng([index, 77, seed])
    kind = tuple(KINDS)[int(rng.choice(len(KINDS), p=list(KINDS.values())))]
    options = _SCENES[kind]
    about = scene(index, split, seed + 1000, kind=options[int(rng.integers(len(options)))])
    return about, ask(kind, about, rng)


def ask(kind: str, about: Scene, rng: np.random.Generator) -> Question:
    """A question of this kind about the scene."""
    thing = about.things[int(rng.integers(len(about.things)))]
    many = about.kind == "many"
    if kind == "how many":
        named = [n for n in ("colour", "shape") if rng.random() < 0.5]
        asked = phrase_of(thing, named).words(plural=True)
        matching = captions.truth([about], [Claim((phrase_of(thing, named),), count=n) for n in range(1, 7)])
        return Question(kind, f"how many {asked} are there?", NUMBERS[int(matching[0].argmax())])
    if kind == "is there":
        # One attribute alone is learned first, and the pair from it.
        named = (["colour"], ["shape"], ["colour", "shape"], ["colour", "shape"])[int(rng.integers(4))]
        claim = Claim((phrase_of(thing, named),))
        if rng.random() < 0.5:
            claim = _absent(claim, about, rng)
        answer = "yes" if captions.is_true(claim, about) else "no"
        return Question(kind, f"is there {claim.text()}?", answer)
    verb, the = ("are", "the") if many else ("is", "the")
    if kind == "where":
        subject = _pointer(about, thing, ("shape", "colour"), rng)
        return Question(kind, f"where {verb} {the} {subject.words(plural=many)}?", thing.position)
    hidden = kind
    others = [n for n in ("shape", "colour", "texture", "size") if n != hidden]
    subject = _pointer(about, thing, others, rng)
    return Question(kind, f"what {kind} {verb} {the} {subject.words(plural=many)}?", getattr(thing, hidden))


def _pointer(about: Scene, thing, names: Sequence[str], rng: np.random.Generator) -> Phrase:
    """A phrase that fits this object and no other that differs from it."""
    first = 0 if rng.random() < 0.8 else int(rng.integers(len(names)))
    ordered = [names[first], *(n for i, n in enumerate(names) if i != first)]
    chosen: list[str] = []
    for name in ordered:
        chosen.append(name)
        phrase = phrase_of(thing, chosen)
        if about.kind != "two" or _fits(phrase, about) == 1:
            return phrase
    return phrase_of(thing, [*names, "position"])


def _fits(phrase: Phrase, about: Scene) -> int:
    return sum(all(getattr(t, n) == getattr(phrase, n) for n in phrase.named()) for t in about.things)


def _absent(claim: Claim, about: Scene, rng: np.random.Generator) -> Claim:
    """A claim that is false of the scene though part of it is true of one of its objects."""
    pair = {"colour", "shape"} <= set(claim.phrases[0].named())
    if pair and about.kind == "two" and rng.random() < 0.7:
        mixed = crossed(about, int(rng.integers(2)))
        if not captions.is_true(mixed, about):
            return mixed
    while captions.is_true(claim, about):
        claim = captions.foil(claim, rng)
    return claim


def crossed(about: Scene, which: int) -> Claim:
    """The colour of object number `which` of two, on the shape of the other."""
    return Claim((Phrase(colour=about.things[which].colour, shape=about.things[1 - which].shape),))


def crossed_question(index: int, split: str = "test", seed: int = 0) -> tuple[Scene, Question] | None:
    """Whether there is the one's colour in the other's shape, or, every second time, an object that there is.

    None for a scene in which both would be true.
    """
    about = scene(index, split, seed + 2000, kind="two")
    which, is_there = index // 2 % 2, index % 2 == 0
    claim, mixed = Claim((phrase_of(about.things[which], ["colour", "shape"]),)), crossed(about, which)
    if captions.is_true(mixed, about):
        return None
    text = (claim if is_there else mixed).text()
    return about, Question("is there", f"is there {text}?", "yes" if is_there else "no")


def several(about: Scene, n: int, rng: np.random.Generator) -> list[Question]:
    """Questions of kinds that suit the scene, for training on many at once; the rare kinds more often."""
    kinds = [k for k in KINDS if about.kind in _SCENES[k]]
    chance = np.array([0.4 if k == "is there" else max(KINDS[k], 0.2) for k in kinds])
    picked = rng.choice(len(kinds), n, p=chance / chance.sum())
    return [ask(kinds[int(i)], about, rng) for i in picked]


def best_guess_rate(asked: Sequence[Question]) -> float:
    """How often the commonest answer to each kind of question is right: what guessing can reach."""
    right = 0
    for kind in KINDS:
        answers = [q.answer for q in asked if q.kind == kind]
        right += max((answers.count(a) for a in set(answers)), default=0)
    return right / max(1, len(asked))
