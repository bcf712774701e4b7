"""A small part of `python -m tests.quality.cross_attention`: what it measures is there at all."""

from __future__ import annotations

import pytest

import mm_adapters as mm
from tests.quality import cross_attention as quality


@pytest.fixture(scope="module")
def model() -> mm.HookedModel:
    loaded = mm.load("tiny-sd")
    loaded.wrapped.set_progress_bar_config(disable=True)
    return loaded


def test_the_map_of_the_object_overlaps_what_was_drawn(
    model: mm.HookedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "TUNING", 4)
    monkeypatch.setitem(quality.OPTIONS, "num_inference_steps", 12)
    found = quality.measure_maps(model, 8, batch=12)
    assert found["IoU, spread"] >= 0.45
    assert found["IoU, spread"] >= found["IoU, daam"] + 0.1
    assert found["IoU, shuffled"] < 0.5 * found["IoU, spread"]


def test_patching_a_colours_keys_and_values_draws_the_other_colour(
    model: mm.HookedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(quality.OPTIONS, "num_inference_steps", 12)
    found = quality.measure_patching(model, "colour", 4)
    assert found["after"]["flipped"] >= 0.75
    assert found["random word"]["flipped"] <= 0.25
