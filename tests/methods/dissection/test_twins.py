"""The null of a dissection: the same units with shuffled weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import mm_adapters as mm
from methods_multimodal.dissection import Concepts, Units, twins_of, with_shuffled_weights
from methods_multimodal.dissection.survey import survey
from mm_adapters import InputError, MissingSiteError
from mm_adapters.zoo import labels, measures, world

SITE = "vision.blocks.1.mlp.hook_post"


@pytest.mark.parametrize("engine", ["hooked", "nnsight"])
def test_shuffled_weights_are_the_same_numbers_elsewhere_and_the_model_stays(engine: Any) -> None:
    model = mm.wrap(tiny.CASES["clip"]().model, engine=engine)
    before = {name: weight.clone() for name, weight in model.wrapped.named_parameters()}
    twin = with_shuffled_weights(model, "vision", 3)
    moved = 0
    for name, weight in twin.wrapped.named_parameters():
        assert torch.equal(model.wrapped.get_parameter(name), before[name])
        assert torch.equal(weight.flatten().sort().values, before[name].flatten().sort().values)
        if name.startswith("vision_model"):
            moved += not torch.equal(weight, before[name])
        else:
            assert torch.equal(weight, before[name])
    assert moved > 10
    inputs = {
        "pixel_values": tiny.pixels(2),
        **{k: v for k, v in tiny.CASES["clip"]().inputs.items() if k != "pixel_values"},
    }
    own, other = (Units(one, SITE).maps(inputs) for one in (model, twin))
    assert not torch.allclose(own, other, atol=1e-3)
    again = with_shuffled_weights(model, "vision", 3)
    assert torch.equal(Units(again, SITE).maps(inputs), other)
    with pytest.raises(MissingSiteError):
        with_shuffled_weights(model, "sound")


def test_a_survey_says_what_the_same_units_reach_with_shuffled_weights(tmp_path: Path) -> None:
    model = mm.load("tiny-clip")
    concepts = Concepts(labels.NAMES, labels.MEMBER_OF)
    scenes = [world.scene(i, "validation", kind="one") for i in range(48)]
    pictures = measures.images_of(scenes)
    parts = [pictures[i : i + 24] for i in (0, 24)]
    batches: Any = [({"images": part, "text": ["a"]}, part) for part in parts]
    options: dict[str, Any] = {"masks": [labels.masks_of(s) for s in scenes], "kernels": ("cosine",)}
    options |= {"n_shuffles": 9, "progress": False}
    units = Units(model, "vision.blocks.3.mlp.hook_post")
    found = survey(
        units, batches, model, concepts, tmp_path / "with", twins=twins_of(units, 1, seed=5), **options
    )
    (twin,) = found.twins
    alone = survey(twins_of(units, 1, seed=5)[0], batches, model, concepts, tmp_path / "alone", **options)
    for method in ("network", "cosine"):
        assert torch.equal(twin.by_name(method).scores, alone.by_name(method).scores)
        threshold = found.random_threshold(method)
        random = twin.by_name(method).scores
        assert int((random.double() >= threshold).sum()) > 0
        assert int((random.double() > threshold).sum()) <= 0.01 * len(random)
        above = (found.by_name(method).scores.double() > threshold).nonzero().flatten().tolist()
        assert found.above_random(method) == above
    # With masks the trained units are above their twins; by the cosine, on so few pictures, they are not.
    assert len(found.above_random("network")) > 0.01 * len(random)
    with pytest.raises(InputError, match="no twins"):
        alone.above_random("network")
    with pytest.raises(InputError, match="No method 'wpmi'"):
        found.by_name("wpmi")
    other = [Units(model, "vision.blocks.2.mlp.hook_post")]
    with pytest.raises(InputError, match="Give the same site"):
        survey(units, batches, model, concepts, tmp_path / "other", twins=other, **options)
