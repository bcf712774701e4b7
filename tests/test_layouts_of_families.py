"""The token layout of families whose sequence is more than one class token and patches."""

from __future__ import annotations

import pytest
import tiny
import torch

import mm_adapters as mm


def vision(name: str) -> mm.TokenLayout:
    case = tiny.CASES[name]()
    model = mm.HookedModel(case.model)
    inputs = {k: v for k, v in case.inputs.items() if "input_ids" not in k}
    return model.layout(**inputs)["vision"]


@pytest.mark.parametrize(
    ("name", "n_class", "n_register"),
    [("vit", 1, 0), ("deit", 2, 0), ("dinov2", 1, 0), ("dinov2_registers", 1, 2), ("dinov3", 1, 2),
     ("dinov3_gated", 1, 0), ("timm_vit", 1, 0), ("timm_vit_average", 1, 2), ("timm_eva", 1, 0)],
)  # fmt: skip
def test_class_and_register_tokens_come_before_the_patches(name: str, n_class: int, n_register: int) -> None:
    layout = vision(name)
    assert layout.positions("class") == list(range(n_class))
    assert layout.positions("register") == list(range(n_class, n_class + n_register))
    assert layout.position_of(1, 0) == n_class + n_register + 2
    case = tiny.CASES[name]()
    run = mm.HookedModel(case.model).run(case.inputs, read=["vision.blocks.0.hook_resid_pre"])
    assert run["vision.blocks.0.hook_resid_pre"].shape[1] == layout.n_pos


@pytest.mark.parametrize("name", ["dinov2_registers", "timm_vit_average"])
def test_a_patch_stands_where_its_pixels_change_the_embedding(name: str) -> None:
    case = tiny.CASES[name]()
    model, layout = mm.HookedModel(case.model), vision(name)
    (key,) = case.inputs
    other = case.inputs[key].clone()
    other[:, :, 14:28, 0:14] += 1.0  # The second row of patches, the first column.
    before, after = (model.run({key: x}, read=["vision.hook_embed"])["vision.hook_embed"]
                     for x in (case.inputs[key], other))  # fmt: skip
    moved = (before - after).abs().amax((0, 2)).nonzero().flatten().tolist()
    assert moved == [layout.position_of(1, 0)]


def test_images_cut_beforehand_have_grids_of_their_own_and_padding() -> None:
    layout = vision("siglip2")
    assert layout.grid is None
    assert layout.positions("pad", row=1) == [4, 5]
    assert layout.patch_rc(5) == (1, 2)
    assert layout.position_of(1, 1, row=1) == 3
    case = tiny.CASES["siglip2"]()
    with pytest.raises(mm.InputError, match="spatial_shapes"):
        mm.HookedModel(case.model).layout(pixel_values=torch.zeros(1, 6, 48))
