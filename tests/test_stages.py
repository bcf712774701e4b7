"""A tower of stages: what has no one meaning for all of them is refused, and what has one is right."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

import mm_adapters as mm
from methods_multimodal.dissection.units import Units
from methods_multimodal.lenses.logit_lens import logit_lens
from methods_multimodal.patching.activation_patching import patch_heads, patch_positions
from methods_multimodal.text_explanations.decomposition import decompose

NO_STREAM = "no one residual stream"


@pytest.fixture(scope="module")
def swin() -> Any:
    case = tiny.CASES["swin_classifier"]()
    return case, mm.HookedModel(case.model)


@pytest.mark.parametrize("name", ["W_Q", "W_O", "W_in", "b_out"])
def test_weights_of_several_widths_are_not_one_stack(swin: Any, name: str) -> None:
    tower = swin[1].vision
    with pytest.raises(mm.MissingSiteError, match=NO_STREAM):
        getattr(tower, name)
    part = tower.blocks[-1].mlp if name in ("W_in", "b_out") else tower.blocks[-1].attn
    assert 24 in getattr(part, name).shape
    assert (tower.cfg.d_model, tower.cfg.n_heads, tower.cfg.n_layers) == (0, 0, 3)


@pytest.mark.parametrize(
    "name",
    [
        "accumulated_resid",
        "decompose_resid",
        "stack_head_results",
        "get_full_resid_decomposition",
    ],
)
def test_what_adds_up_in_one_stream_is_refused(swin: Any, name: str) -> None:
    case, model = swin
    cache = model.vision.run_with_cache(case.inputs["pixel_values"])[1]
    with pytest.raises(mm.MissingSiteError, match=NO_STREAM):
        getattr(cache, name)()


def test_methods_of_one_stream_refuse_before_they_run(swin: Any) -> None:
    case, model = swin
    with pytest.raises(mm.MissingSiteError, match=NO_STREAM):
        logit_lens(model, case.inputs, final_norm=True, tower="vision")
    with pytest.raises(mm.MissingSiteError, match=NO_STREAM):
        decompose(model, images=case.inputs["pixel_values"])
    with pytest.raises(mm.MissingSiteError, match="halved from stage to stage"):
        model.towers["vision"].patch_layout(case.inputs["pixel_values"])


def test_the_mean_of_the_last_stage_is_what_its_head_reads(swin: Any) -> None:
    case, model = swin
    pixels = case.inputs["pixel_values"]
    last = model.run(case.inputs, read=["vision.ln_final.hook_normalized"])["vision.ln_final.hook_normalized"]
    tower, head = model.vision, case.model.classifier
    pooled = (last * tower.ln_final.w + tower.ln_final.b).mean(1)
    torch.testing.assert_close(pooled @ tower.projection + head.bias, case.model(pixels).logits)
    alone = mm.wrap(tiny.CASES["swin"]().model)
    assert torch.equal(alone.vision.projection, torch.eye(48))
    assert tower.W_pos.shape == (36, 12)


@pytest.mark.parametrize("layer", [0, 2])
def test_units_have_maps_of_the_grid_of_their_stage(swin: Any, layer: int) -> None:
    case, model = swin
    site = f"vision.blocks.{layer}.hook_resid_post"
    maps = Units(model, site).maps(case.inputs)
    side = 6 if layer == 0 else 3
    assert torch.equal(maps.flatten(2).mT, model.run(case.inputs, read=[site])[site])
    assert maps.shape[2:] == (side, side)
    with pytest.raises(mm.InputError, match="one image per row"):
        Units(model, "vision.blocks.0.attn.hook_z").maps(case.inputs)


def test_layers_of_different_numbers_of_units_are_not_patched_by_the_fewest(swin: Any) -> None:
    case, model = swin
    clean, corrupted = ({"pixel_values": case.inputs["pixel_values"][[i]]} for i in (0, 1))

    def metric(output: Any) -> torch.Tensor:
        return output.logits[:, 0]

    options: dict[str, Any] = {"tower": "vision"}
    with pytest.raises(mm.InputError, match=r"differ in how many units .* has: 2, 3"):
        patch_heads(model, clean, corrupted, metric, layers=[0, 2], **options)
    with pytest.raises(mm.InputError, match=r"differ in how many units .* has: 9, 36"):
        patch_positions(model, clean, corrupted, metric, layers=[1, 2], **options)
    found = patch_heads(model, clean, corrupted, metric, layers=[0, 1], **options)
    slow = []
    for layer in (0, 1):
        site = f"vision.blocks.{layer}.attn.hook_z"
        z = model.run(clean, read=[site])[site]
        for head in (0, 1):

            def swap(value: torch.Tensor, z: torch.Tensor = z, head: int = head) -> torch.Tensor:
                value = value.clone()
                value[:, :, head] = z[:, :, head]
                return value

            slow.append(metric(model.run(corrupted, edit=[mm.Edit(site, swap)]).output))
    torch.testing.assert_close(found.patched.flatten(), torch.cat(slow), rtol=1e-5, atol=1e-6)
