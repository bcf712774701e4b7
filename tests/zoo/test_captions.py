"""Captions and questions are true, and foils are not."""

import numpy as np

from mm_adapters.zoo import captions, questions, world
from mm_adapters.zoo.captions import Claim, Phrase


def _slowly_true(claim: Claim, scene: world.Scene) -> bool:
    def fits(phrase: Phrase, thing: world.Thing) -> bool:
        return all(getattr(phrase, n) in (None, getattr(thing, n)) for n in captions.VALUES)

    if claim.background not in (None, scene.background):
        return False
    first = [t for t in scene.things if fits(claim.phrases[0], t)]
    if claim.count is not None:
        return len(first) == claim.count
    if claim.relation is None:
        return bool(first)
    second = [t for t in scene.things if fits(claim.phrases[1], t)]
    return any(
        a is not b and (claim.relation == "and" or world.holds(claim.relation, a, b))
        for a in first
        for b in second
    )


def test_truth_table_equals_checking_each_claim_alone():
    rng = np.random.default_rng(0)
    scenes = [world.scene(i) for i in range(60)]
    claims = [captions.caption(scene, rng) for scene in scenes]
    claims += [captions.foil(claim, rng) for claim in claims]
    table = captions.truth(scenes, claims)
    assert table.tolist() == [[_slowly_true(claim, scene) for claim in claims] for scene in scenes]


def test_captions_are_true_and_foils_almost_never():
    rng = np.random.default_rng(1)
    scenes = [world.scene(i, "test") for i in range(400)]
    claims = [captions.caption(scene, rng) for scene in scenes]
    assert all(captions.is_true(c, s) for c, s in zip(claims, scenes, strict=True))
    foils = [captions.foil(claim, rng) for claim in claims]
    assert all(f != c for f, c in zip(foils, claims, strict=True))
    assert np.mean([captions.is_true(f, s) for f, s in zip(foils, scenes, strict=True)]) < 0.05


def test_claims_read_as_english():
    red, blue = Phrase(colour="red", shape="circle"), Phrase(colour="blue", shape="square")
    assert (
        Claim((red, blue), "left of", None, "white").text()
        == "a red circle left of a blue square on a white background"
    )
    assert Claim((Phrase(shape="cross"),), count=3).text("a photo of ") == "a photo of three crosses"
    assert Claim((Phrase(colour="orange", position="top left"),)).text() == "an orange object in the top left"


def test_answers_agree_with_the_masks():
    for i in range(300):
        scene, asked = questions.question(i, "test")
        shown = world.index_map(scene)
        if asked.kind == "how many":
            words = asked.text.removeprefix("how many ").removesuffix(" are there?")
            counted = 0
            for number, thing in enumerate(scene.things, start=1):
                fits = all(
                    w in (thing.colour, thing.shape + "s", thing.shape + "es", "objects")
                    for w in words.split()
                )
                counted += fits and bool((shown == number).any())
            assert asked.answer == captions.NUMBERS[counted - 1]
        elif asked.kind == "is there":
            words = asked.text.removesuffix("?").split()[3:]
            there = any(set(words) <= {t.colour, t.shape, "object"} for t in scene.things)
            assert asked.answer == ("yes" if there else "no")
        else:
            field = {"colour": "colour", "shape": "shape", "where": "position"}[asked.kind]
            meant = [thing for thing in scene.things if _described(thing, asked.text)]
            assert len({getattr(thing, field) for thing in meant}) == 1 or scene.kind == "many"
            assert asked.answer in {getattr(thing, field) for thing in meant}


def _described(thing: world.Thing, text: str) -> bool:
    """Whether every telling word of the text is true of the object."""
    text, _, position = text.removesuffix("?").partition(" in the ")
    plain = {"where", "what", "colour", "shape", "is", "are", "the", "object", "objects"}
    telling = {word for word in text.split() if word not in plain}
    own = {thing.shape, thing.shape + "s", thing.shape + "es", thing.colour, thing.texture, thing.size}
    return telling <= own and position in ("", thing.position)


def test_guessing_reaches_less_than_a_fifth():
    asked = [questions.question(i, "test")[1] for i in range(3000)]
    assert questions.best_guess_rate(asked) < 0.2
    assert {q.kind for q in asked} == set(questions.KINDS)
