"""Logit attribution: the shares sum to the model's own logit, and each goes to who wrote it."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from einops import einsum

import mm_adapters as mm
from methods_multimodal.lenses.direct_attribution import (
    LogitAttribution,
    attribute_logits,
    attribute_tokens,
)

DUAL = ("clip", "open_clip", "open_clip_custom_text")


@pytest.mark.parametrize("name", DUAL)
def test_shares_sum_to_the_models_own_logit(name: str) -> None:
    built = tiny.CASES[name]()
    found = attribute_logits(mm.HookedModel(built.model), built.inputs)
    with torch.no_grad():
        output = built.model(**built.inputs)
    if name == "clip":
        own = output.logits_per_image
    else:
        own = output["logit_scale"] * output["image_features"] @ output["text_features"].T
    assert (found.total - own).abs().max() <= 1e-5 * own.abs().max()
    assert found.residual <= 1e-5
    assert sum(found.shares(1, 0).values()) == pytest.approx(float(own[1, 0]), rel=1e-5)


@pytest.mark.parametrize("name", DUAL)
def test_head_shares_equal_transformer_lens_logit_attrs(name: str) -> None:
    built = tiny.CASES[name]()
    model = mm.HookedModel(built.model)
    found = attribute_logits(model, built.inputs)
    pixels = built.inputs.get("pixel_values", built.inputs.get("image"))
    words = built.inputs.get("input_ids", built.inputs.get("text"))
    mask = {k: v for k, v in built.inputs.items() if k == "attention_mask"}
    with torch.no_grad():
        directions = model.text(words, return_type="embeds", **mask)
        model.vision.set_classes(["one", "two"], directions)
        _, cache = model.vision.run_with_cache(pixels)
        image = model.vision(pixels, return_type="embeds")
        heads = cache.stack_head_results(pos_slice=0)
        shares = cache.logit_attrs(heads, tokens="two", pos_slice=0)
    model.vision.set_classes(None)
    scale = built.model.logit_scale.exp() / image.norm(dim=-1)
    expected = (shares * scale).detach()
    got = found.heads[:, 1].flatten(1).T
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_planted_head_has_the_largest_share() -> None:
    built = tiny.clip()
    vision, text = built.model.vision_model, 1
    with torch.no_grad():
        direction = built.model(**built.inputs).text_embeds[text]
        wanted = vision.post_layernorm.weight * (built.model.visual_projection.weight.T @ direction)
        attention = vision.encoder.layers[1].self_attn
        head = slice(2 * 8, 3 * 8)  # Head 2 of layer 1 writes the same thing whatever it sees.
        attention.v_proj.weight[head] = 0
        attention.v_proj.bias[head] = 0
        attention.v_proj.bias[2 * 8] = 6.0
        attention.out_proj.weight[:, head] = 0
        attention.out_proj.weight[:, 2 * 8] = (wanted - wanted.mean()) / wanted.norm()
    found = attribute_logits(mm.HookedModel(built.model), built.inputs)
    for image in range(2):
        assert found.heads[image, text].flatten().argmax() == 1 * 4 + 2
        # Far above everything else, as it was planted to be.
        assert found.heads[image, text, 1, 2] > 2 * found.mlps[image, text].abs().max()


def test_a_difference_of_texts_is_the_difference_of_their_shares() -> None:
    built = tiny.clip()
    found = attribute_logits(mm.HookedModel(built.model), built.inputs, texts=["one", "two"])
    gap = found.minus(0, 1)
    own = built.model(**built.inputs).logits_per_image.detach()
    torch.testing.assert_close(gap.total[:, 0], own[:, 0] - own[:, 1], rtol=1e-4, atol=1e-5)
    assert gap.texts == ("one − two",)


def test_a_tower_pooled_by_attention_says_why_it_has_no_attribution() -> None:
    built = tiny.siglip()
    for module in built.model.modules():
        module.register_forward_pre_hook(lambda *_: pytest.fail("The model ran."))
    with pytest.raises(mm.MissingSiteError, match="pooled by attention"):
        attribute_logits(mm.HookedModel(built.model), built.inputs)


@pytest.mark.parametrize("name", ["llava", "llava_siglip_qwen", "gemma3", "blip_2"])
def test_token_shares_sum_to_the_models_own_logit(name: str) -> None:
    built = tiny.CASES[name]()
    found = attribute_tokens(mm.HookedModel(built.model), built.inputs, [5, 9, 30])
    last = [row.nonzero().max() for row in built.inputs["attention_mask"]]
    own = built.model(**built.inputs).logits[[0, 1], last][:, [5, 9, 30]].detach()
    assert (found.total - own).abs().max() <= 1e-5 * own.abs().max()
    assert found.residual <= 1e-5


def test_a_heads_share_of_a_token_is_what_its_removal_takes_away_at_a_frozen_norm() -> None:
    built = tiny.llava()
    found = attribute_tokens(mm.HookedModel(built.model), built.inputs, [5])
    language, seen = built.model.model.language_model, {}
    last = language.layers[-1]
    handles = [
        last.self_attn.o_proj.register_forward_pre_hook(lambda m, a: seen.update(z=a[0])),
        language.norm.register_forward_pre_hook(lambda m, a: seen.update(x=a[0])),
    ]
    with torch.no_grad():
        built.model(**built.inputs)
        for handle in handles:
            handle.remove()
        head = slice(8, 16)  # Head 1 of four, 8 wide.
        wrote = seen["z"][:, -1, head] @ last.self_attn.o_proj.weight[:, head].T
        scale = (seen["x"][:, -1].square().mean(-1, keepdim=True) + language.norm.variance_epsilon).sqrt()
        row = built.model.lm_head.weight[5]
        expected = einsum(wrote / scale * language.norm.weight, row, "b d, d -> b")
    torch.testing.assert_close(found.heads[:, 0, -1, 1], expected, rtol=1e-5, atol=1e-6)


def test_a_record_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    built = tiny.clip()
    found = attribute_logits(mm.HookedModel(built.model), built.inputs, texts=["one", "two"])
    path = found.save(tmp_path / "found.safetensors")
    back = LogitAttribution.load(path)
    assert torch.equal(back.heads, found.heads)
    assert torch.equal(back.logit, found.logit)
    assert back.texts == ("one", "two")
    assert [p.name for p in tmp_path.iterdir()] == ["found.safetensors"]
