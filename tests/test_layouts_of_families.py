"""The token layout of families whose sequence is more than one class token and patches."""

from __future__ import annotations

from itertools import product

import pytest
import tiny
import torch

import mm_adapters as mm
from mm_adapters.tokens.by_part import Layouts


def vision(name: str) -> mm.TokenLayout:
    case = tiny.CASES[name]()
    model = mm.HookedModel(case.model)
    inputs = {k: v for k, v in case.inputs.items() if "input_ids" not in k}
    return model.layout(**inputs)["vision"]


@pytest.mark.parametrize(
    ("name", "n_class", "n_register"),
    [
        ("vit", 1, 0),
        ("deit", 2, 0),
        ("dinov2", 1, 0),
        ("dinov2_registers", 1, 2),
        ("dinov3", 1, 2),
        ("dinov3_gated", 1, 0),
        ("timm_vit", 1, 0),
        ("timm_vit_average", 1, 2),
        ("timm_eva", 1, 0),
    ],
)
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
    before, after = (
        model.run({key: x}, read=["vision.hook_embed"])["vision.hook_embed"]
        for x in (case.inputs[key], other)
    )
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


def staged(name: str, *size: int) -> tuple[mm.HookedModel, torch.Tensor, Layouts]:
    """A model whose grid is halved on the way, two images of its own or this size, their layouts."""
    case = tiny.CASES[name]()
    model, pixels = mm.wrap(case.model), case.inputs["pixel_values"]
    pixels = pixels[..., : size[0], : size[1]] if size else pixels
    return model, pixels, model.layout(pixel_values=pixels)


# The last has an edge that is no whole patch, and grids of 11 x 10, 6 x 5 and 3 x 3.
each_swin = pytest.mark.parametrize(
    ("name", "size"), [("swin", ()), ("swinv2", ()), ("swin_classifier", ()), ("swin", (42, 38))]
)


@each_swin
def test_the_positions_that_see_a_patch_are_those_the_layout_of_their_stage_names(
    name: str, size: tuple[int, ...]
) -> None:
    model, pixels, layouts = staged(name, *size)
    # Attention is kept from mixing positions, so each sees its own pixels, wherever it is moved to.
    deaf = [mm.Edit(s.name, torch.zeros_like) for s in model.sitemap if s.part == "hook_attn_out"]
    parts = (
        "hook_embed",
        "hook_resid_pre",
        "attn.hook_q",
        "attn.hook_v",
        "ln2.hook_normalized",
        "hook_resid_post",
        "ln.hook_scale",
        "hook_out",
        "ln_final.hook_normalized",
    )
    sites = [s.name for s in model.sitemap if s.part in parts]
    blank = model.run({"pixel_values": pixels}, read=sites, edit=deaf)
    down, across = layouts["vision.hook_embed"].grid or (0, 0)
    for image, (r, c) in product((0, 1), ((0, 0), (down - 1, 0), (4, 7), (down - 1, across - 1))):
        if r >= down or c >= across:
            continue
        lit = pixels.clone()
        lit[image, :, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4] += torch.linspace(1, 3, 3)[:, None, None]
        run = model.run({"pixel_values": lit}, read=sites, edit=deaf)
        for site in sites:
            layout = layouts.at(site)
            assert run[site].shape[:2] == (layout.n_rows, layout.n_pos), site
            assert layout.grid is not None
            halved = round(down / layout.grid[0])  # The grid's side is that of the patches, over 1, 2 or 4.
            moved = ((run[site] - blank[site]).flatten(2).norm(dim=-1) > 1e-5).nonzero().tolist()
            # A batch's rows are images; where they are windows, the layout says of which image.
            windows = layout.n_rows > 2 or ".attn." in site
            at = (
                layout.row_and_position_of(r // halved, c // halved, image=image)
                if windows
                else (image, layout.position_of(r // halved, c // halved, row=image))
            )
            assert moved == [list(at)], (site, moved, at)


@each_swin
def test_a_patch_attends_within_its_window_and_not_across_the_edge_it_was_rolled_over(
    name: str, size: tuple[int, ...]
) -> None:
    model, pixels, layouts = staged(name, *size)
    sites = [s.name for s in model.sitemap if s.part == "attn.hook_pattern"]
    run = model.run({"pixel_values": pixels}, read=sites)
    rolled = 0
    for site in sites:
        layout, pattern = layouts.at(site), run[site].amin(1)
        assert pattern.shape == (layout.n_rows, layout.n_pos, layout.n_pos)
        for row, patches in enumerate(layout.patches):
            for (q, one), (k, other) in product(enumerate(patches), repeat=2):
                if one is None or other is None:
                    continue
                # Neighbours in a window are less than its side apart in the picture.
                near = max(abs(one[0] - other[0]), abs(one[1] - other[1])) < layout.n_pos**0.5
                assert (pattern[row, q, k] > 1e-12) == near, (site, row, one, other)
                rolled += not near
    assert rolled


@each_swin
def test_what_a_window_writes_comes_out_in_the_stream_where_both_layouts_say(
    name: str, size: tuple[int, ...]
) -> None:
    model, pixels, layouts = staged(name, *size)
    for block in ("vision.blocks.0", "vision.blocks.1"):
        windows, stream, out = layouts[f"{block}.attn"], layouts[block], f"{block}.hook_attn_out"
        plain = model.run({"pixel_values": pixels}, read=[out])[out]
        for image, (r, c) in product((0, 1), ((0, 0), (3, 4), (5, 2))):
            row, pos = windows.row_and_position_of(r, c, image=image)
            shift = mm.Edit(f"{block}.attn.hook_z", lambda z: z + 1, rows=[row], positions=[pos])
            run = model.run({"pixel_values": pixels}, read=[out], edit=[shift])
            moved = (run[out] - plain).norm(dim=-1) > 1e-5
            assert moved.nonzero().tolist() == [[image, stream.position_of(r, c, row=image)]]


def test_every_patch_of_every_image_is_once_in_each_layout_of_its_stage() -> None:
    _, pixels, layouts = staged("swin")
    for name, layout in layouts.items():
        assert layout.grid is not None
        seen = [
            (image if layout.n_rows > len(pixels) or name.endswith("attn") else row, place)
            for row in range(layout.n_rows)
            for place, image in zip(layout.patches[row], layout.image_index[row], strict=True)
            if place is not None
        ]
        every = product(range(len(pixels)), product(*map(range, layout.grid)))
        assert sorted(seen) == sorted(every), name  # type: ignore[type-var]
    assert [layouts[f"vision.blocks.{i}"].grid for i in range(5)] == [(11, 11)] * 2 + [(6, 6)] + [(3, 3)] * 2


def test_a_tower_of_stages_has_no_one_layout() -> None:
    _, _, layouts = staged("swin")
    with pytest.raises(mm.MissingSiteError, match=r"vision change on the way.*vision\.blocks\.0\.attn"):
        layouts["vision"]
    with pytest.raises(mm.MissingSiteError, match=r"no layout of the positions of text\.blocks\.0"):
        layouts.at("text.blocks.0")
    with pytest.raises(KeyError):
        layouts["text"]
    with pytest.raises(ValueError, match=r"\(11, 0\) of image 0"):
        layouts.at("vision.hook_embed").row_and_position_of(11, 0)
    case = tiny.CASES["clip_vision"]()
    plain = mm.wrap(case.model).layout(**case.inputs)
    assert plain.at("vision.blocks.0.attn.hook_pattern") is plain["vision"]
    assert layouts.at("vision.blocks.1.hook_attn_out") is layouts["vision.blocks.0"]
