"""The same method gives the same numbers through both engines."""

from __future__ import annotations

from typing import Any

import tiny
import torch

import mm_adapters as mm
from methods_multimodal.core.grids import image_layout
from methods_multimodal.cross_attention import word_maps
from methods_multimodal.lenses.direct_attribution import attribute_logits, attribute_tokens
from methods_multimodal.lenses.logit_lens import logit_lens
from methods_multimodal.patching.activation_patching import patch_heads, patch_positions
from methods_multimodal.relevance.attention_maps import head_maps
from mm_adapters.traced import TracedModel


def engines(name: str) -> tuple[tiny.Case, mm.HookedModel, TracedModel]:
    """A case, and both engines, each over a model of its own with the same weights."""
    built, again = tiny.CASES[name](), tiny.CASES[name]()
    return built, mm.HookedModel(built.model), TracedModel(again.model)


def test_attribution_and_maps_of_images_and_texts() -> None:
    built, model, traced = engines("clip")
    ours, theirs = (attribute_logits(one, built.inputs) for one in (model, traced))
    assert torch.equal(ours.heads, theirs.heads)
    assert torch.equal(ours.logit, theirs.logit)
    layout = image_layout(model, built.inputs["pixel_values"])
    every: dict[str, Any] = {"tower": "vision", "layers": range(3)}
    maps = [head_maps(one, built.inputs, layout, **every).maps for one in (model, traced)]
    assert torch.equal(*maps)


def test_attribution_and_lens_of_answers() -> None:
    built, model, traced = engines("llava")
    ours, theirs = (attribute_tokens(one, built.inputs, [5]) for one in (model, traced))
    assert torch.equal(ours.heads, theirs.heads)
    ours, theirs = (logit_lens(one, built.inputs, final_norm=True) for one in (model, traced))
    assert torch.equal(ours.scores, theirs.scores)


def test_patching() -> None:
    built, model, traced = engines("clip_vision")
    clean, corrupted = ({"pixel_values": built.inputs["pixel_values"][[i]]} for i in (0, 1))
    for patch in (patch_heads, patch_positions):
        ours, theirs = (
            patch(one, clean, corrupted, lambda o: o.pooler_output[:, 0], tower="vision", layers=[0, 2])
            for one in (model, traced)
        )
        assert torch.equal(ours.patched, theirs.patched)


def test_word_maps() -> None:
    _, model, traced = engines("stable_diffusion")
    inputs = {"prompt": "a cat", "num_inference_steps": 2, "seed": 0}
    ours, theirs = (word_maps(engine, inputs)[0] for engine in (model, traced))
    for grid, maps in ours.by_grid.items():
        assert torch.equal(maps, theirs.by_grid[grid])
