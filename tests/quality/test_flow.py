"""A small part of `python -m tests.quality.flow`: exact laws, and an object beside as many patches."""

from __future__ import annotations

import pytest
import torch

import mm_adapters as mm
from methods_multimodal.patching import Cut, knock_out
from tests.quality import flow as quality
from tests.quality.asked import asked, correct, gap, roles


@pytest.fixture(scope="module")
def model() -> mm.HookedModel:
    return mm.load("tiny-llava")


def test_laws_hold_exactly(model: mm.HookedModel) -> None:
    found = quality.laws(model, 4)
    scale = found.pop("(the block before it, for scale)")
    assert set(found.values()) == {0.0}
    assert scale > 1


def test_blocking_the_object_costs_the_answer_and_as_many_others_do_not(model: mm.HookedModel) -> None:
    some = asked("colour", 40, "test", things="two", seed=1)
    own = roles(model, some)
    control = own.matched("object", "background")
    cuts = [Cut("object", own["text"], own["object"]), Cut("control", own["text"], control)]
    found = knock_out(model, some.inputs(), correct(model, some), cuts)
    blocked, others = (-100 * found.effect.mean(1)).tolist()
    assert blocked >= 60
    assert others < 10


def test_twins_differ_in_the_answer_alone() -> None:
    some = asked("shape", 12, "test", things="two")
    for scene, twin, question, wrong in zip(some.scenes, some.twins, some.questions, some.wrong, strict=True):
        other = [(a, b) for a, b in zip(scene.things, twin.things, strict=True) if a != b]
        assert len(other) == 1
        assert (other[0][0].shape, other[0][1].shape) == (question.answer, wrong)
        assert wrong not in {thing.shape for thing in scene.things}


def test_the_metric_tells_scenes_from_their_twins(model: mm.HookedModel) -> None:
    some = asked("colour", 8, "test", things="two", seed=1)
    metric = gap(model, some)
    clean, twin = (metric(model.run(some.inputs(twin=t)).output) for t in (False, True))
    assert float((clean - twin).mean()) > 5
    assert torch.equal(metric(model.run(some.inputs()).output), clean)
