"""Second-order effects: the factored form is the sum over tokens and heads that defines them."""

from __future__ import annotations

import pytest
import tiny
import torch
from einops import einsum, rearrange
from torch import Tensor

import mm_adapters as mm
from methods_multimodal.text_explanations.second_order import (
    principal_directions,
    second_order,
    text_codes,
)
from mm_adapters.traced import TracedModel


def by_definition(model: torch.nn.Module, pixels: Tensor, layer: int) -> Tensor:
    """Every neuron's part of every later block's input, at each token, through attention: [n, b, width]."""
    vision = model.vision_model
    layers, kept, handles = vision.encoder.layers, {}, []
    for i, block in enumerate(layers):
        handles.append(
            block.register_forward_pre_hook(
                lambda m, a, k, i=i: kept.update({i: a[0] if a else k["hidden_states"]}), with_kwargs=True
            )
        )
    handles.append(layers[layer].mlp.fc2.register_forward_pre_hook(lambda m, a: kept.update(act=a[0])))
    handles.append(vision.post_layernorm.register_forward_pre_hook(lambda m, a: kept.update(end=a[0])))
    with torch.no_grad():
        vision(pixels)
        for handle in handles:
            handle.remove()
        written = einsum(kept["act"], layers[layer].mlp.fc2.weight, "b i n, m n -> b i n m")
        total = torch.zeros(written.shape[2], len(pixels), model.visual_projection.weight.shape[0])
        end = kept["end"]
        final = (end.var(-1, unbiased=False, keepdim=True) + vision.post_layernorm.eps).sqrt()
        for block in list(layers)[layer + 1 :]:
            x, a = kept[list(layers).index(block)], block.self_attn
            deviation = (x.var(-1, unbiased=False, keepdim=True) + block.layer_norm1.eps).sqrt()
            normed = block.layer_norm1(x)
            q, k = (rearrange(p(normed), "b n (h d) -> b h n d", h=a.num_heads) for p in (a.q_proj, a.k_proj))
            pattern = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)[:, :, 0]
            part = (
                (written - written.mean(-1, keepdim=True)) / deviation.unsqueeze(2) * block.layer_norm1.weight
            )
            value = rearrange(part @ a.v_proj.weight.T, "b i n (h d) -> b i n h d", h=a.num_heads)
            mixed = rearrange(einsum(pattern, value, "b h i, b i n h d -> n b h d"), "n b h d -> n b (h d)")
            out = mixed @ a.out_proj.weight.T
            out = (out - out.mean(-1, keepdim=True)) / final * vision.post_layernorm.weight
            total += out @ model.visual_projection.weight.T
    return total


@pytest.mark.parametrize("layer", [0, 1])
def test_effects_are_the_sum_over_tokens_and_later_heads(layer: int) -> None:
    built = tiny.clip()
    pixels = tiny.pixels(5)
    found = second_order(mm.HookedModel(built.model), images=pixels, layer=layer, batch_size=2)
    expected = by_definition(built.model, pixels, layer)
    torch.testing.assert_close(found.effects(slice(None)), expected, rtol=1e-4, atol=1e-5)
    some = second_order(mm.HookedModel(built.model), images=pixels, layer=layer, neurons=range(7, 11))
    torch.testing.assert_close(some.effects(slice(None)), expected[7:11], rtol=1e-4, atol=1e-5)
    assert some.neurons == (7, 8, 9, 10)


def test_both_engines_give_the_same_effects() -> None:
    ours, theirs = (
        second_order(build(tiny.clip().model), images=tiny.pixels(3), layer=1)
        for build in (mm.HookedModel, TracedModel)
    )
    assert torch.equal(ours.amounts, theirs.amounts)


def test_principal_directions_are_those_of_the_effects_themselves() -> None:
    built = tiny.clip()
    found = second_order(mm.HookedModel(built.model), images=tiny.pixels(40), layer=0)
    made = principal_directions(found, top=10, at_once=7)
    effects = found.effects(slice(None))
    effects = effects - effects.mean(1, keepdim=True)
    torch.testing.assert_close(made.sizes, effects.norm(dim=-1).T, rtol=1e-3, atol=1e-5)
    for neuron in (0, 8, 47):
        rows = effects[neuron][effects[neuron].norm(dim=-1).topk(10).indices]
        axis = torch.linalg.svd(rows, full_matrices=False).Vh[0]
        assert abs(float(axis @ made.directions[neuron])) == pytest.approx(1.0, abs=1e-3)
        assert int((rows @ made.directions[neuron] > 0).sum()) >= 5


def test_a_direction_mixed_of_two_texts_is_said_by_these_two() -> None:
    g = torch.Generator().manual_seed(0)
    texts = torch.randn(200, 64, generator=g)
    rows = torch.nn.functional.normalize(texts, dim=1)
    rows = torch.nn.functional.normalize(rows - rows.mean(0), dim=1)
    codes = text_codes((0.8 * rows[3] - 0.5 * rows[90])[None], texts, l1=0.1)
    assert codes[0].abs().topk(2).indices.tolist() == [3, 90]
    assert codes[0, 3] > 0 > codes[0, 90]


def test_what_has_no_second_order_effect_is_said() -> None:
    model = mm.HookedModel(tiny.clip().model)
    with pytest.raises(mm.InputError, match="layers 0 to 1"):
        second_order(model, images=tiny.pixels(), layer=2)
    with pytest.raises(mm.MissingSiteError, match=r"pooled by attention.*first position"):
        second_order(mm.HookedModel(tiny.siglip().model), images=tiny.pixels(), layer=0)
    fused = mm.HookedModel(tiny.CASES["open_clip_eva"]().model)
    with pytest.raises(mm.MissingSiteError, match="attn has no W_V"):
        second_order(fused, images=tiny.pixels(), layer=0)
