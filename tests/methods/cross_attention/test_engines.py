"""Seeing, tracing and control give the same numbers through both engines."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from torch import Tensor

import mm_adapters as mm
from methods_multimodal.cross_attention import (
    Case,
    LocalBlend,
    Part,
    WordEdit,
    ablate_heads,
    attribute_patching,
    bind_attributes,
    edit_words,
    grid,
    knock_out_words,
    memorisation_score,
    patch_words,
    restore_text,
    word_changes,
    word_maps,
)
from mm_adapters.traced import TracedModel

OPTIONS: dict[str, Any] = {"num_inference_steps": 2, "height": 16, "width": 24, "guidance_scale": 3.0}
CASES = [Case("a big cat", "big", "a red cat", "red", seed=0)]


def both() -> tuple[mm.Model, mm.Model]:
    return mm.HookedModel(tiny.stable_diffusion().model), TracedModel(tiny.stable_diffusion().model)


def brightness(images: Tensor) -> Tensor:
    return images.mean((1, 2, 3))


def test_word_maps() -> None:
    models = both()
    inputs = {**OPTIONS, "prompt": ["a big cat", "dog"], "seed": [0, 1], "output_type": "pt"}
    found = [word_maps(model, inputs, keep=("head",), spread=True) for model in models]
    for recipe in ("mean", "daam", "spread", "relative"):
        assert torch.equal(*(maps.at(recipe) for maps, _ in found))
    assert torch.equal(*(output.images for _, output in found))


def test_tracing() -> None:
    models = both()
    parts = [Part(), *grid(models[0], steps=((0,), (1,)))[:3]]
    for trace in (patch_words, knock_out_words, ablate_heads):
        ours, theirs = (trace(model, CASES, brightness, parts, options=OPTIONS) for model in models)
        assert torch.equal(ours.changed, theirs.changed)
        assert torch.equal(ours.goal, theirs.goal)
        assert torch.equal(ours.control, theirs.control)
    ours, theirs = (word_changes(model, "a big cat", options=OPTIONS) for model in models)
    assert torch.equal(ours.changed, theirs.changed)
    ours, theirs = (restore_text(model, CASES, brightness, options=OPTIONS) for model in models)
    assert torch.equal(ours.changed, theirs.changed)
    ours, theirs = (attribute_patching(model, CASES, brightness, options=OPTIONS) for model in models)
    assert torch.equal(ours.effects, theirs.effects)


def test_control() -> None:
    models = both()
    edits = [
        WordEdit("a red cat", "replace", blend=LocalBlend(("cat",))),
        WordEdit("a big fat cat", "refine", weights={"fat": 2.0}),
    ]
    options = {k: v for k, v in OPTIONS.items() if k != "num_inference_steps"}
    found = [edit_words(model, "a big cat", edits, n_steps=3, options=options) for model in models]
    assert torch.equal(*found)
    found = [
        bind_attributes(model, "red cat big dog", [("red", "cat")], n_steps=3, options=options)
        for model in models
    ]
    assert torch.equal(*found)
    scores = [memorisation_score(model, "a cat", [(0, 1)], seeds=[0, 1], options=OPTIONS) for model in models]
    assert scores[0] == scores[1]
