"""Pairs that differ in what belongs to what, heads that learn it, judges of several objects."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from mm_adapters.zoo import binding, captions, drawing, judges, questions, world
from mm_adapters.zoo.captions import Claim, Phrase
from mm_adapters.zoo.judges import Object


def pairs(n: int):
    rng = np.random.default_rng(5)
    return [binding.pair(world.scene(i, kind="two", any_radius=i % 2 == 1), rng) for i in range(n)]


def test_each_claim_is_true_of_its_scene_and_false_of_the_other():
    for first, second, claim, counter in pairs(120):
        assert captions.truth([first, second], [claim, counter]).tolist() == [[True, False], [False, True]]


def test_a_pair_holds_the_same_values_and_places_and_no_pair_that_is_kept_for_the_end():
    swapped = set()
    for first, second, _, _ in pairs(120):
        for name in ("shape", "colour", "texture", "size"):
            mine, others = ([getattr(t, name) for t in s.things] for s in (first, second))
            assert sorted(mine) == sorted(others)
            swapped |= {name} if mine != others else set()
        assert [(t.x, t.y) for t in first.things] == [(t.x, t.y) for t in second.things]
        for thing in (*first.things, *second.things):
            assert (thing.shape, thing.colour) not in world.HELD_OUT_PAIRS
            assert thing.size == ("small" if thing.radius < 10 else "large")
    assert swapped == {"shape", "colour", "texture", "size"}


def test_what_is_together_is_of_one_object_and_what_is_apart_of_two():
    scene = world.by_hand(
        "white",
        world.thing("circle", "red", position="left", size="small"),
        world.thing("star", "blue", position="right", texture="dotted"),
    )
    together, apart = binding.joined([scene])
    names = [(a, v, b, w) for a, b in binding.JOINED for v in captions.VALUES[a] for w in captions.VALUES[b]]
    have = {names[i] for i in torch.nonzero(together[0])[:, 0].tolist()}
    crossed = {names[i] for i in torch.nonzero(apart[0])[:, 0].tolist()}
    assert {(v, w) for _, v, _, w in have} == {
        *(("circle", "red"), ("circle", "solid"), ("circle", "small"), ("red", "solid"), ("red", "small")),
        *(("star", "blue"), ("star", "dotted"), ("star", "large"), ("blue", "dotted"), ("blue", "large")),
    }
    assert ("shape", "circle", "colour", "blue") in crossed
    assert ("colour", "blue", "size", "small") in crossed
    assert not have & crossed
    assert len(crossed) == 10


def test_heads_are_right_when_they_say_what_the_scene_has():
    scenes = [first for first, _, _, _ in pairs(6)]
    heads = binding.Heads(4, 144)
    together, apart = binding.joined(scenes)
    with torch.no_grad():
        heads.image.weight.copy_(20.0 * torch.eye(144))
        heads.image.bias.zero_()
        patches = torch.randn(6, 64, 4)
        right = heads(2.0 * together.float() - 1, patches, scenes)
        turned = heads(1 - 2.0 * together.float(), patches, scenes)
    assert apart.any()
    assert turned - right == pytest.approx(40.0, abs=0.1)  # 20 for what is there, 20 for what is not.


def test_any_radius_keeps_to_what_the_words_allow():
    scenes = [world.scene(i, kind=("one", "two")[i % 2], any_radius=True) for i in range(200)]
    of = {size: [t.radius for s in scenes for t in s.things if t.size == size] for size in world.SIZES}
    for size, (low, high) in world.RADII.items():
        assert low <= min(of[size]) < low + 0.3
        assert high - 0.3 < max(of[size]) <= high
    plain = world.scene(7, kind="two")
    assert [(t.shape, t.x) for t in plain.things] == [
        (t.shape, t.x) for t in world.scene(7, kind="two", any_radius=True).things
    ]


def test_adjectives_stand_in_the_order_that_is_asked_for():
    claim = Claim((Phrase("small", "striped", "red", "circle"),))
    assert claim.text() == "a small striped red circle"
    assert claim.text(order=("colour", "size", "texture")) == "a red small striped circle"
    drawn = {captions.adjectives(np.random.default_rng(i)) for i in range(60)}
    assert len(drawn) == 6


def test_pixel_rules_see_every_object_of_rendered_scenes():
    right, n = 0, 0
    for i in range(60):
        scene = world.scene(i, "validation", 4, kind=("one", "two")[i % 2])
        seen = judges.objects(world.render(scene))
        assert len(seen) == len(scene.things)
        for thing in scene.things:
            near = min(seen, key=lambda o: abs(o.x - thing.x) + abs(o.y - thing.y))
            assert abs(near.x - thing.x) < 2.5
            right += (near.shape, near.colour, near.texture, near.size) == (
                *(thing.shape, thing.colour, thing.texture, thing.size),
            )
            n += 1
    assert right / n > 0.95
    assert judges.objects(np.full((64, 64, 3), 128, np.uint8)) == []


RED, BLUE = (
    Object("circle", "red", "solid", "small", 16, 32),
    Object("star", "blue", "dotted", "large", 48, 30),
)


@pytest.mark.parametrize(
    ("claim", "seen", "right"),
    [
        (Claim((Phrase(colour="red", shape="circle"),)), [RED], True),
        (Claim((Phrase(colour="red", shape="star"),)), [RED], False),
        (Claim((Phrase(colour="red", shape="circle"),)), [RED, BLUE], False),
        (Claim((Phrase(colour="red"), Phrase(colour="blue")), "left of"), [BLUE, RED], True),
        (Claim((Phrase(colour="blue"), Phrase(colour="red")), "right of"), [BLUE, RED], True),
        (Claim((Phrase(colour="blue"), Phrase(colour="red")), "left of"), [BLUE, RED], False),
        (Claim((Phrase(colour="red"), Phrase(colour="blue")), "above"), [RED, BLUE], False),
        (Claim((Phrase(colour="blue"), Phrase(shape="circle")), "and"), [RED, BLUE], True),
        (Claim((Phrase(colour="red", shape="star"), Phrase(colour="blue")), "and"), [RED, BLUE], False),
        (Claim((Phrase(colour="red"), Phrase(colour="blue")), "and"), [RED], False),
    ],
)
def test_a_picture_shows_a_claim_if_it_holds_these_objects_and_no_other(claim, seen, right):
    assert drawing.shows(claim, seen) is right


def test_rendered_scenes_show_the_claims_that_are_asked_of_drawn_ones():
    for make in (drawing.short_prompts, drawing.two_object_prompts):
        scenes, claims = zip(*make(30), strict=True)
        seen = [judges.objects(world.render(scene)) for scene in scenes]
        assert sum(drawing.shows(c, s) for c, s in zip(claims, seen, strict=True)) >= 29
        assert sum(drawing.shows(c, s) for c, s in zip(claims[1:], seen, strict=False)) <= 4


def test_pixel_rules_see_through_the_blur_of_an_autoencoder():
    seen, things = [], []
    for i in range(60):
        scene = world.scene(i, "validation", 5, kind="one", solid=i % 3 != 0)
        blurred = ndimage.gaussian_filter(world.render(scene).astype(float), (0.8, 0.8, 0))
        seen.append(judges.objects(blurred.round().astype(np.uint8)))
        things.append(scene.things[0])
    assert [len(one) for one in seen] == [1] * 60
    for attribute, least in (("shape", 57), ("colour", 57), ("texture", 57), ("size", 54)):
        right = [
            getattr(one[0], attribute) == getattr(t, attribute) for one, t in zip(seen, things, strict=True)
        ]
        assert sum(right) >= least, attribute


def test_a_question_about_crossed_objects_is_answered_by_the_scene():
    cases = [case for i in range(80) if (case := questions.crossed_question(i)) is not None]
    assert {q.answer for _, q in cases} == {"yes", "no"}
    for scene, asked in cases:
        colour, shape = asked.text.removesuffix("?").split()[-2:]
        assert {colour} <= {t.colour for t in scene.things}
        assert {shape} <= {t.shape for t in scene.things}
        there = any((t.colour, t.shape) == (colour, shape) for t in scene.things)
        assert asked.answer == ("yes" if there else "no")
