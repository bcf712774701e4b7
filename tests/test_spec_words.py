"""Words of a family record, each against what the model computes without them."""

from __future__ import annotations

from functools import cache

import pytest
import tiny_unified
import tiny_vlm
import torch
import transformers as hf

import mm_adapters as mm


@cache
def hooked(name: str) -> tuple[tiny_vlm.Case, mm.HookedModel]:
    case = (tiny_vlm.CASES | tiny_unified.CASES)[name]()
    return case, mm.HookedModel(case.model)


def test_a_gain_stored_less_one_is_whole_in_the_towers_weights() -> None:
    case, model = hooked("paligemma")
    site = "language.ln_final.hook_normalized"
    run = model.run(case.inputs, read=[site])
    weights = model.language
    logits = (run[site] * weights.ln_final.w) @ weights.W_U
    torch.testing.assert_close(logits, run.output.logits, rtol=1e-4, atol=1e-4)
    some = torch.tensor([3, 7])
    read = run[site] @ weights.tokens_to_residual_directions(some).T
    torch.testing.assert_close(read, run.output.logits[..., some], rtol=1e-4, atol=1e-4)


def test_a_packed_pattern_is_that_of_each_image_alone_on_a_diagonal() -> None:
    case, model = hooked("qwen2_vl")
    patches, grids = case.inputs["pixel_values"], case.inputs["image_grid_thw"]
    site = "vision.blocks.1.attn.hook_pattern"
    together = model.run(case.inputs, read=[site])[site][0]
    sizes = [int(h * w) for _, h, w in grids]
    slow = torch.zeros_like(together)
    start = 0
    for i, size in enumerate(sizes):
        ids = case.inputs["input_ids"][i : i + 1]
        alone = {
            "input_ids": ids,
            "mm_token_type_ids": (ids == tiny_vlm.IMAGE).int(),
            "pixel_values": patches[start : start + size],
            "image_grid_thw": grids[i : i + 1],
        }
        own = slice(start, start + size)
        slow[:, own, own] = model.run(alone, read=[site])[site][0]
        start += size
    torch.testing.assert_close(together, slow, rtol=1e-5, atol=1e-6)


def test_windows_attend_within_themselves_and_full_blocks_within_an_image() -> None:
    case, model = hooked("qwen2_5_vl")
    sites = [f"vision.blocks.{i}.attn.hook_pattern" for i in (0, 1)]
    run = model.run(case.inputs, read=sites)
    # Windows of 4 x 4 patches: a 6 x 6 image has four, of 16, 8, 8 and 4; a 2 x 4 image has one.
    for site, sizes in zip(sites, ([16, 8, 8, 4, 8], [36, 8]), strict=True):
        of = torch.repeat_interleave(torch.tensor(sizes))
        assert torch.equal(run[site][0, 0] > 0, of[:, None] == of)


@pytest.mark.parametrize(
    ("name", "tower", "stack"),
    [
        ("internvl", "vision", "blocks"),
        ("mllama", "vision", "global_blocks"),
    ],
)
def test_what_gained_branches_write_adds_up_to_the_stream(name: str, tower: str, stack: str) -> None:
    case, model = hooked(name)
    at = [
        f"{tower}.{stack}.0.{part}"
        for part in (
            "hook_resid_pre",
            "hook_attn_out",
            "hook_resid_mid",
            "hook_mlp_out",
            "hook_resid_post",
            "attn.hook_z",
        )
    ]
    run = model.run(case.inputs, read=at)
    pre, attn, mid, mlp, post, z = (run[site] for site in at)
    torch.testing.assert_close(pre + attn, mid, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mid + mlp, post, rtol=1e-4, atol=1e-5)
    part = getattr(model.vision, stack)[0].attn
    heads = torch.einsum("bnhd,hdm->bnm", z, part.W_O) + part.b_O
    torch.testing.assert_close(heads, attn, rtol=1e-4, atol=1e-5)


def test_a_closed_gate_refuses_an_edit_and_lets_the_stream_be_edited() -> None:
    case = tiny_vlm.mllama()
    with torch.no_grad():
        case.model.model.language_model.layers[1].cross_attn_attn_gate.zero_()
    model = mm.HookedModel(case.model)
    site = "language.blocks.1.hook_cross_attn_out"
    assert not model.run(case.inputs, read=[site])[site].any()
    with pytest.raises(ValueError, match="cross_attn_attn_gate is zero"):
        model.run(case.inputs, edit=[mm.Edit(site, lambda x: x + 1)])
    run = model.run(case.inputs, edit=[mm.Edit("language.blocks.1.hook_resid_mid", lambda x: x + 1)])
    assert run.receipts[0].moved > 0


def test_an_edit_in_mid_block_is_an_edit_of_what_comes_before_it() -> None:
    case, model = hooked("internvl")
    shift = torch.randn(24, generator=torch.Generator().manual_seed(0))
    out = []
    for part in ("hook_attn_out", "hook_resid_mid"):
        edit = [mm.Edit(f"vision.blocks.0.{part}", lambda x: x + shift)]
        out.append(case.head(model.run(case.inputs, edit=edit).output))
    torch.testing.assert_close(out[0], out[1], rtol=1e-4, atol=1e-4)


def test_blocks_of_another_kind_are_an_error_not_another_meaning() -> None:
    model = tiny_unified.chameleon().model
    config = hf.ChameleonConfig.from_dict(model.config.to_dict() | {"swin_norm": True})
    with pytest.raises(mm.UnknownFamilyError, match="ChameleonSwinDecoderLayer"):
        mm.HookedModel(hf.ChameleonForConditionalGeneration(config).eval())


@pytest.mark.skipif("molmo2" in tiny_vlm.LACKING, reason="this transformers has no Molmo 2")
@pytest.mark.parametrize("after", [False, True])
def test_what_a_branch_adds_follows_from_how_its_block_was_built(after: bool) -> None:
    case = tiny_vlm.molmo2(norm_after=after)
    model, block = mm.HookedModel(case.model), "language.blocks.0"
    names = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    layer = case.model.model.language_model.layers[0]
    given: list[torch.Tensor] = []
    # The stream itself, as the MLP's branch is given it.
    branch = layer.mlp if after else layer.post_attention_layernorm
    handle = branch.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    run = model.run(case.inputs, read=[f"{block}.hook_{name}" for name in names])
    handle.remove()
    before, attended, middle, thought, end = (run[f"{block}.hook_{name}"] for name in names)
    torch.testing.assert_close(middle, given[0], rtol=0, atol=0)
    torch.testing.assert_close(before + attended, middle, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(middle + thought, end, rtol=1e-6, atol=1e-6)
