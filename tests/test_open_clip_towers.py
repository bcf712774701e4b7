"""open_clip's towers as they were built: how they pool, and alone."""

from __future__ import annotations

import pytest
import tiny
import torch
from PIL import Image

import mm_adapters as mm
from mm_adapters._errors import MissingSiteError


@pytest.mark.parametrize(
    ("name", "vision", "text"),
    [
        ("open_clip", "first", "end"),
        ("open_clip_average", "mean", "last"),
        ("open_clip_timm_siglip", "attention", "end"),
    ],
)
def test_a_tower_pools_as_it_was_built(name: str, vision: str, text: str) -> None:
    towers = mm.HookedModel(tiny.CASES[name]().model).sitemap.towers
    assert (towers["vision"].record.pool, towers["text"].record.pool) == (vision, text)


def test_the_mean_of_patches_projected_is_the_image_embedding() -> None:
    case = tiny.CASES["open_clip_average"]()
    model = mm.HookedModel(case.model)
    run = model.run(case.inputs, read=["vision.ln_final.hook_normalized"])
    norm = case.model.visual.ln_post
    pooled = (run["vision.ln_final.hook_normalized"] * norm.weight + norm.bias)[:, 1:].mean(1)
    want = case.model.encode_image(case.inputs["image"])
    torch.testing.assert_close(pooled @ model.vision.projection, want, rtol=1e-5, atol=1e-5)


def test_a_tower_that_pools_by_attention_has_no_matrix_to_its_summary() -> None:
    model = mm.HookedModel(tiny.CASES["open_clip_timm_siglip"]().model)
    with pytest.raises(MissingSiteError, match="attention"):
        _ = model.vision.projection


def test_a_lone_tower_takes_pictures() -> None:
    from torchvision.transforms import CenterCrop, Compose, Resize, ToTensor

    tower = tiny.CASES["open_clip"]().model.visual
    model = mm.wrap(tower, image_processor=Compose([Resize(28), CenterCrop(28), ToTensor()]))
    picture = Image.new("RGB", (40, 30), "red")
    run = model.run({"images": [picture]}, read=["vision.blocks.0.attn.hook_pattern"])
    assert run["vision.blocks.0.attn.hook_pattern"].shape == (1, 4, 5, 5)
    assert model.layout(images=[picture])["vision"].grid == (2, 2)
