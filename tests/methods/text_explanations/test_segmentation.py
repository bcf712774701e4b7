"""Segmentation: maps are the patches' own contributions, and the scores those of torchmetrics' formulas."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

import mm_adapters as mm
from methods_multimodal.text_explanations.decomposition import decompose
from methods_multimodal.text_explanations.segmentation import (
    above,
    best_threshold,
    segment,
    segmentation_scores,
)
from mm_adapters.traced import TracedModel
from mm_adapters.zoo import sample_images


def test_maps_are_the_patches_parts_of_the_cosine_with_the_text() -> None:
    built = tiny.clip()
    pixels = built.inputs["pixel_values"]
    texts = torch.nn.functional.normalize(torch.randn(3, 16), dim=1)
    model = mm.HookedModel(built.model)
    found = segment(model, pixels, texts, torch.tensor([[0, 2], [1, 1]]))
    whole = decompose(model, images=pixels, onto=texts - texts.mean(0)).heads.sum((1, 3))[:, 1:]
    expected = torch.stack([whole[0, :, [0, 2]].T, whole[1, :, [1, 1]].T]).reshape(2, 2, 2, 2)
    stretched = torch.nn.functional.interpolate(expected, size=(28, 28), mode="bilinear")
    torch.testing.assert_close(found.maps, stretched, rtol=1e-4, atol=1e-5)
    likeliest = segment(model, pixels, texts).chosen[:, 0]
    own = decompose(model, images=pixels).own @ (texts - texts.mean(0)).T
    assert likeliest.tolist() == own.argmax(1).tolist()


def test_both_engines_give_the_same_maps_also_of_moved_images() -> None:
    texts, pixels = torch.randn(3, 16), tiny.pixels()
    made = [
        segment(build(tiny.clip().model), pixels, texts, shifts=2) for build in (mm.HookedModel, TracedModel)
    ]
    assert torch.equal(made[0].maps, made[1].maps)
    assert made[0].maps.shape == (2, 1, 28, 28)


def test_scores_are_counted_over_all_pixels() -> None:
    maps = torch.zeros(2, 4, 4)
    maps[0, :2] = 1.0
    maps[1, 0, 0] = 1.0
    truth = torch.zeros(2, 4, 4, dtype=torch.bool)
    truth[0, :2] = True
    truth[1, 0, :2] = True
    scores = segmentation_scores(maps, truth, 0.5)
    assert scores.pixel_accuracy == pytest.approx(31 / 32)
    assert scores.foreground_iou == pytest.approx(9 / 10)
    assert scores.mean_iou == pytest.approx((9 / 10 + 22 / 23) / 2)
    # The second map ranks one of its two pixels first and the other among 15 equals.
    assert scores.average_precision == pytest.approx((1 + (0.5 + 0.5 * 2 / 16)) / 2)
    assert best_threshold(maps, truth) in (None, *np.round(np.arange(1, 10) * 0.1, 1).tolist())
    assert not above(-maps, 0.5).any()


def test_moving_needs_pixels() -> None:
    with pytest.raises(mm.InputError, match="prepared pixels"):
        segment(mm.HookedModel(tiny.clip().model), ["a.png"], torch.randn(3, 16), shifts=2)


def test_both_engines_stretch_raw_images_to_what_the_model_saw() -> None:
    texts, picture = torch.randn(3, 128), sample_images()["red_circle"]
    hooked, traced = (mm.load("tiny-clip", engine=engine) for engine in ("hooked", "nnsight"))
    ours, theirs = (segment(model, [picture], texts) for model in (hooked, traced))
    assert torch.equal(ours.maps, theirs.maps)
    (pixels,) = hooked.prepare(images=[picture]).values()
    assert torch.equal(ours.maps, segment(hooked, pixels, texts).maps)
    assert ours.maps.shape[-2:] == pixels.shape[-2:]


def test_texts_of_another_width_are_refused() -> None:
    with pytest.raises(mm.InputError, match="texts are 8 wide; the embedding is 16"):
        segment(mm.HookedModel(tiny.clip().model), tiny.pixels(), torch.randn(3, 8))
