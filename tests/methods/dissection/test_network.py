"""Network dissection against a slow version that walks over pixels, and the thresholds it uses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

import mm_adapters as mm
from methods_multimodal.dissection import Concepts, NetworkDissection, Units, network_dissection
from methods_multimodal.dissection.network import Overlap, upsampled
from methods_multimodal.dissection.thresholds import Sketch, TopShare
from mm_adapters import InputError, MissingSiteError
from mm_adapters.traced import TracedModel
from mm_adapters.zoo import sample_images

CONCEPTS = Concepts(("red", "blue", "circle", "square"), ("colour", "colour", "shape", "shape"))


def made_masks(n: int, size: int = 6) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    out = []
    for _ in range(n):
        shown = [name for name in CONCEPTS.names if rng.random() < 0.6]
        out.append({name: rng.random((size, size)) < 0.4 for name in shown})
    return out


def slow_iou(
    maps: Tensor, thresholds: Tensor, masks: list[dict[str, np.ndarray]], counted: str
) -> list[list[float]]:
    size = next(m for shown in masks for m in shown.values()).shape
    table = []
    for unit in range(maps.shape[1]):
        row = []
        for concept, category in zip(CONCEPTS.names, CONCEPTS.categories, strict=True):
            shared = either = 0
            for image, shown in enumerate(masks):
                of_category = [
                    m for name, m in shown.items() if CONCEPTS.categories[CONCEPTS.index(name)] == category
                ]
                on = (upsampled(maps[image], size)[unit] > thresholds[unit]).numpy()
                if not of_category or (counted == "lite" and not any((on & m).any() for m in of_category)):
                    continue
                label = shown.get(concept, np.zeros(size, bool))
                for y in range(size[0]):
                    for x in range(size[1]):
                        shared += int(on[y, x] and label[y, x])
                        either += int(on[y, x] or label[y, x])
            row.append(shared / either if either else 0.0)
        table.append(row)
    return table


@pytest.mark.parametrize("counted", ["paper", "lite"])
def test_iou_equals_a_walk_over_pixels(counted: Any) -> None:
    masks = made_masks(12)
    maps = torch.randn(12, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    thresholds = torch.tensor([0.3, 0.8, 5.0])
    overlap = Overlap(CONCEPTS, 3, counted)
    for map_, shown in zip(maps, masks, strict=True):
        overlap.add(map_, thresholds, shown)
    slow = torch.tensor(slow_iou(maps, thresholds, masks, counted))
    torch.testing.assert_close(overlap.iou(), slow, atol=1e-6, rtol=0)
    assert slow.max() > 0.1
    assert (overlap.iou()[2] == 0).all()  # A unit that is never on.


def test_exact_threshold_is_exceeded_by_the_share_and_no_more() -> None:
    values = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
    top = TopShare(0.05, 1000)
    for part in values.split(130):
        top.add(part)
    assert ((values > top.threshold()).sum(0) == 50).all()


def test_sketch_is_near_the_exact_threshold_in_memory_that_does_not_grow() -> None:
    made = torch.Generator().manual_seed(0)
    sketch, exact = Sketch(0.005, size=2048), TopShare(0.005, 400_000)
    for _ in range(100):
        part = torch.randn(4000, 2, generator=made)
        sketch.add(part)
        exact.add(part)
    assert sum(len(level) for level in sketch._levels) < 2048 * 10
    # The quantile of a normal: what it should be, and how far a sketch of this size may be off.
    torch.testing.assert_close(exact.threshold(), torch.full((2,), 2.5758), atol=0.02, rtol=0)
    torch.testing.assert_close(sketch.threshold(), exact.threshold(), atol=0.12, rtol=0)


def test_units_of_a_vision_tower_lie_where_their_patches_are() -> None:
    model = mm.HookedModel(tiny.CASES["clip_vision"]().model)
    pixels = torch.zeros(1, *tiny.pixels(1).shape[1:])
    units = Units(model, "vision.blocks.0.hook_resid_pre")
    still = units.maps({"pixel_values": pixels})
    layout = model.layout(pixel_values=pixels)["vision"]
    rows, columns = layout.grid or (0, 0)
    assert still.shape == (1, model.vision.cfg.d_model, rows, columns)
    step = pixels.shape[-1] // columns
    pixels[..., step : 2 * step, step : 2 * step] = 5.0
    moved = (units.maps({"pixel_values": pixels}) - still).square().sum(1)[0]
    assert [tuple(place) for place in (moved > 0).nonzero().tolist()] == [(1, 1)]


@pytest.mark.parametrize("name", ["clip_vision", "tiny-llava", "stable_diffusion"])
def test_both_engines_give_the_same_dissection(name: str) -> None:
    picture = sample_images()["red_circle"]
    if name in tiny.CASES:
        built, again = tiny.CASES[name](), tiny.CASES[name]()
        model, traced = mm.HookedModel(built.model), TracedModel(again.model)
        inputs: dict[str, Any] = built.inputs
    else:
        model, traced = mm.load(name), mm.load(name, engine="nnsight")
        inputs = {"text": ["<image>\nquestion: where is the circle? answer:"] * 2, "images": [picture] * 2}
    if name == "stable_diffusion":
        inputs = {"prompt": ["a cat", "a dog"], "num_inference_steps": 2, "seed": 0}
    site = {
        "clip_vision": "vision.blocks.1.attn.hook_z",
        "tiny-llava": "language.blocks.1.mlp.hook_post",
        "stable_diffusion": "denoiser.resnets.1.hook_out",
    }[name]
    found: list[NetworkDissection] = []
    for one in (model, traced):
        units = Units(one, site)
        found.append(network_dissection(units, [inputs], made_masks(2), CONCEPTS, share=0.3, progress=False))
    assert torch.equal(found[0].iou, found[1].iou)
    assert found[0].iou.max() > 0


def test_an_sae_s_latents_are_units_through_its_encoder() -> None:
    model = mm.HookedModel(tiny.CASES["clip_vision"]().model)
    weight = torch.randn(32, 50, generator=torch.Generator().manual_seed(0))
    inputs = {"pixel_values": tiny.pixels(2)}
    site = "vision.blocks.0.hook_resid_post"
    plain = Units(model, site).maps(inputs)
    latents = Units(model, site, through=lambda x: torch.relu(x @ weight)).maps(inputs)
    wanted = torch.relu(torch.einsum("budc,uk->bkdc", plain, weight))
    torch.testing.assert_close(latents, wanted)


def test_results_are_saved_and_read_back(tmp_path: Any) -> None:
    record = NetworkDissection(
        torch.rand(3, 4), torch.rand(3), CONCEPTS.names, CONCEPTS.categories, "site", 5
    )
    again = NetworkDissection.load(record.save(tmp_path / "found.safetensors"))
    assert torch.equal(again.iou, record.iou)
    assert again.best() == record.best()


def test_what_cannot_be_dissected_says_so() -> None:
    model = mm.HookedModel(tiny.CASES["clip_vision"]().model)
    with pytest.raises(InputError, match="no units on a grid"):
        Units(model, "vision.blocks.0.attn.hook_pattern")
    with pytest.raises(MissingSiteError, match="nearest"):
        Units(model, "vision.blocks.0.mlp.hook_pots")
    with pytest.raises(InputError, match="no sampling steps"):
        Units(model, "vision.blocks.0.mlp.hook_post", steps=[1])
    whole = mm.load("tiny-clip")
    units = Units(whole, "text.blocks.0.mlp.hook_post")
    with pytest.raises(MissingSiteError, match=r"layout has no 'patch' role"):
        units.maps({"text": ["a red circle"], "images": [sample_images()["red_circle"]]})
    units = Units(model, "vision.blocks.0.mlp.hook_post")
    batch = [{"pixel_values": tiny.pixels(2)}]
    with pytest.raises(InputError, match="masks of 3"):
        network_dissection(units, batch, made_masks(3), CONCEPTS, progress=False)
    with pytest.raises(InputError, match="No concept 'green'"):
        network_dissection(units, batch, [{"green": np.ones((2, 2), bool)}], CONCEPTS, progress=False)
    with pytest.raises(InputError, match="listed twice: red"):
        Concepts(("red", "red"), ("a", "a"))
