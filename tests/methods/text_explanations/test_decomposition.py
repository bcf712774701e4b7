"""Decomposition: the components sum to the model's own embedding, and each is what its head wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from einops import einsum, rearrange
from torch import Tensor

import mm_adapters as mm
from methods_multimodal.text_explanations.decomposition import Decomposition, decompose
from mm_adapters.traced import TracedModel
from mm_adapters.zoo import sample_images

IMAGES: dict[str, Any] = {
    "clip": lambda m, x: m.get_image_features(x).pooler_output,
    "siglip": lambda m, x: m.get_image_features(x).pooler_output,
    "open_clip": lambda m, x: m.encode_image(x),
    "open_clip_custom_text": lambda m, x: m.encode_image(x),
    "clip_vision": lambda m, x: m(x).pooler_output,
    "clip_vision_projected": lambda m, x: m(x).image_embeds,
    "siglip_vision": lambda m, x: m(x).pooler_output,
    "llava": lambda m, x: m.model.vision_tower(x).pooler_output,
    "llava_siglip_qwen": lambda m, x: m.model.vision_tower(x).pooler_output,
}
TEXTS: dict[str, Any] = {
    "clip": lambda m, **x: m.get_text_features(**x).pooler_output,
    "siglip": lambda m, **x: m.get_text_features(**x).pooler_output,
    "open_clip": lambda m, text: m.encode_text(text),
    "open_clip_custom_text": lambda m, text: m.encode_text(text),
    "clip_text": lambda m, **x: m(**x).pooler_output,
    "clip_text_projected": lambda m, **x: m(**x).text_embeds,
    "siglip_text": lambda m, **x: m(**x).pooler_output,
}
TEXT_ARGUMENTS = ("input_ids", "attention_mask", "text")


def pixels_of(built: tiny.Case) -> Tensor:
    return built.inputs["pixel_values"] if "pixel_values" in built.inputs else built.inputs["image"]


def gap(found: Tensor, own: Tensor) -> float:
    return float(((found - own).norm(dim=-1) / own.norm(dim=-1)).max())


@pytest.mark.parametrize("tokens", ["keep", "sum"])
@pytest.mark.parametrize("name", IMAGES)
def test_image_components_sum_to_the_models_own_embedding(name: str, tokens: Any) -> None:
    built = tiny.CASES[name]()
    found = decompose(mm.HookedModel(built.model), images=pixels_of(built), tokens=tokens)
    with torch.no_grad():
        own = IMAGES[name](built.model, pixels_of(built))
    assert gap(found.total, own) <= 1e-5
    assert found.check() <= 1e-5


@pytest.mark.parametrize("name", TEXTS)
def test_text_components_sum_to_the_models_own_embedding(name: str) -> None:
    built = tiny.CASES[name]()
    given = {k: v for k, v in built.inputs.items() if k in TEXT_ARGUMENTS}
    found = decompose(mm.HookedModel(built.model), texts=given)
    with torch.no_grad():
        own = TEXTS[name](built.model, **given)
    assert gap(found.total, own) <= 1e-5
    assert found.check() <= 1e-5


@pytest.mark.parametrize("name", ["clip", "siglip", "open_clip", "llava"])
def test_in_bfloat16_the_sum_is_within_a_hundredth(name: str) -> None:
    built = tiny.CASES[name]()
    model = built.model.to(torch.bfloat16)
    pixels = pixels_of(built).to(torch.bfloat16)
    texts = {k: v for k, v in built.inputs.items() if k in TEXT_ARGUMENTS} if name in TEXTS else None
    with torch.no_grad():
        sides: list[tuple[dict[str, Any], Tensor]] = [
            ({"images": pixels}, IMAGES[name](model, pixels).float())
        ]
        if texts is not None:
            sides.append(({"texts": texts}, TEXTS[name](model, **texts).float()))
    for given, own in sides:
        kept = decompose(mm.HookedModel(model), **given)
        summed = decompose(mm.HookedModel(model), **given, tokens="sum")
        assert kept.heads.dtype == torch.float32
        assert max(kept.check(), summed.check()) <= 1e-2
        # Looking inside a fused kernel takes its place, and it rounds otherwise: only where nothing
        # had to be opened is the run of the plain model the same.
        if name != "open_clip":
            assert gap(summed.total, own) <= 1e-2


def test_a_stopped_sum_would_be_noticed() -> None:
    built = tiny.clip()
    found = decompose(mm.HookedModel(built.model), images=pixels_of(built))
    without = found.total - found.heads[:, 1, :, 2].sum(1)
    assert gap(without, found.own) > 1e-3


def plain_head_outputs(model: Any, pixels: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """By plain hooks: each layer's head outputs [b, query, key, head, d], its MLP's, and the end."""
    layers, kept, handles = model.encoder.layers, {}, []
    for i, block in enumerate(layers):

        def attended(module: Any, args: Any, kwargs: Any, i: int = i) -> None:
            kept["x", i] = kwargs.get("hidden_states", args[0] if args else None)

        def mlp(module: Any, args: Any, out: Tensor, i: int = i) -> None:
            kept["mlp", i] = out

        handles += [
            block.self_attn.register_forward_pre_hook(attended, with_kwargs=True),
            block.mlp.register_forward_hook(mlp),
        ]
    last = layers[-1].register_forward_hook(lambda m, a, out: kept.update(end=out))
    with torch.no_grad():
        model(pixels)
        for handle in (*handles, last):
            handle.remove()
        heads = []
        for i, block in enumerate(layers):
            a, n_heads = block.self_attn, block.self_attn.num_heads
            q, k, v = (
                rearrange(p(kept["x", i]), "b n (h d) -> b h n d", h=n_heads)
                for p in (a.q_proj, a.k_proj, a.v_proj)
            )
            pattern = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
            out = rearrange(a.out_proj.weight, "m (h d) -> h d m", h=n_heads)
            heads.append(einsum(pattern, v, out, "b h q k, b h k d, h d m -> b q k h m"))
    end = kept["end"] if isinstance(kept["end"], Tensor) else kept["end"][0]
    return heads, [kept["mlp", i] for i in range(len(layers))], end


def test_each_head_and_token_is_what_plain_hooks_find() -> None:
    built = tiny.clip()
    vision, pixels = built.model.vision_model, pixels_of(built)
    found = decompose(mm.HookedModel(built.model), images=pixels)
    heads, mlps, end = plain_head_outputs(vision, pixels)
    norm = vision.post_layernorm
    deviation = (end[:, 0].var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()

    def to_joint(x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scale = deviation.reshape(len(deviation), *[1] * (x.ndim - 1))
        return (centred / scale * norm.weight) @ built.model.visual_projection.weight.T

    with torch.no_grad():
        expected = torch.stack([to_joint(h[:, 0]) for h in heads], 1)
        expected_mlps = torch.stack([to_joint(m[:, 0]) for m in mlps], 1)
    torch.testing.assert_close(found.heads, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.mlps[:, 1:], expected_mlps, rtol=1e-5, atol=1e-5)
    assert found.grid == (2, 2)


def test_uniform_shares_are_the_published_convention() -> None:
    """As published: c + b_O/(nH) - mean/(K n H), times gain/deviation, + bias/(K n H), K = 2 layers + 1."""
    built = tiny.clip()
    vision, pixels = built.model.vision_model, pixels_of(built)
    found = decompose(mm.HookedModel(built.model), images=pixels, shares="uniform")
    heads, mlps, end = plain_head_outputs(vision, pixels)
    norm, n_layers = vision.post_layernorm, len(heads)
    n, n_heads = heads[0].shape[2], heads[0].shape[3]
    terms = 2 * n_layers + 1
    cls = end[:, 0]
    mean, deviation = cls.mean(-1), (cls.var(-1, unbiased=False) + norm.eps).sqrt()
    project = built.model.visual_projection.weight.T
    with torch.no_grad():
        own = built.model.get_image_features(pixels).pooler_output
        for layer, output in enumerate(heads):
            bias = vision.encoder.layers[layer].self_attn.out_proj.bias
            c = output[:, 0] + bias / (n * n_heads) - mean[:, None, None, None] / (terms * n * n_heads)
            c = c * norm.weight / deviation[:, None, None, None] + norm.bias / (terms * n * n_heads)
            torch.testing.assert_close(found.heads[:, layer], c @ project, rtol=1e-5, atol=1e-5)
            c = (mlps[layer][:, 0] - mean[:, None] / terms) * norm.weight / deviation[
                :, None
            ] + norm.bias / terms
            torch.testing.assert_close(found.mlps[:, 1 + layer], c @ project, rtol=1e-5, atol=1e-5)
            published = (c @ project) / own.norm(dim=-1, keepdim=True)
            torch.testing.assert_close(found.unit().mlps[:, 1 + layer], published, rtol=1e-5, atol=1e-6)
    assert gap(found.total, own) <= 1e-5


def test_behind_an_attention_pooling_each_head_is_what_is_left_of_it_at_frozen_attention_and_norm() -> None:
    built = tiny.siglip_vision()
    pixels, vision = pixels_of(built), built.model
    found = decompose(mm.HookedModel(vision), images=pixels)
    heads, _, end = plain_head_outputs(vision, pixels)
    norm, pool = vision.post_layernorm, vision.head.attention
    with torch.no_grad():
        seen = norm(end)
        probe = vision.head.probe.expand(len(pixels), -1, -1)
        _, pattern = pool(probe, seen, seen, need_weights=True, average_attn_weights=False)
        deviation = (end.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
        value = pool.in_proj_weight.chunk(3)[2]
        for layer, output in enumerate(heads):
            for head in range(output.shape[3]):
                for token in range(output.shape[2]):
                    wrote = output[:, :, token, head]  # At every position, from this one.
                    flat = (wrote - wrote.mean(-1, keepdim=True)) / deviation * norm.weight
                    v = rearrange(flat @ value.T, "b n (g d) -> b g n d", g=pool.num_heads)
                    pooled = rearrange(pattern @ v, "b g 1 d -> b (g d)") @ pool.out_proj.weight.T
                    torch.testing.assert_close(
                        found.heads[:, layer, token, head], pooled, rtol=1e-4, atol=1e-5
                    )


@pytest.mark.parametrize("name", ["clip", "siglip", "open_clip", "llava"])
def test_both_engines_give_the_same_numbers(name: str) -> None:
    built = tiny.CASES[name]()
    model, traced = mm.HookedModel(built.model), TracedModel(tiny.CASES[name]().model)
    for tokens in ("keep", "sum"):
        ours, theirs = (decompose(m, images=pixels_of(built), tokens=tokens) for m in (model, traced))
        assert torch.equal(ours.heads, theirs.heads)
        assert torch.equal(ours.total, theirs.total)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_onto_directions_is_the_projection_of_the_whole(name: str) -> None:
    built = tiny.CASES[name]()
    model, pixels = mm.HookedModel(built.model), pixels_of(built)
    whole = decompose(model, images=pixels)
    directions = torch.randn(3, whole.own.shape[1])
    along = decompose(model, images=pixels, onto=directions)
    torch.testing.assert_close(along.heads, whole.heads @ directions.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(along.unit().total, whole.unit().own @ directions.T, rtol=1e-4, atol=1e-5)
    summed = decompose(model, images=pixels, tokens="sum")
    torch.testing.assert_close(summed.heads, whole.summed().heads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-llava"])
def test_pictures_paths_folders_and_pixels_are_all_images(name: str) -> None:
    from PIL import Image

    model = mm.load(name)
    files = list(sample_images().values())[:3]
    by_path = decompose(model, images=files, tokens="sum", batch_size=2)
    opened = [Image.open(f) for f in files]
    by_picture = decompose(model, images=(picture for picture in opened), tokens="sum", batch_size=2)
    pixels = model.prepare(images=files)["pixel_values"]
    by_pixels = decompose(model, images=pixels, tokens="sum", batch_size=2)
    folder = decompose(model, images=files[0].parent, tokens="sum", batch_size=2)
    assert torch.equal(by_path.heads, by_picture.heads)
    assert torch.equal(by_path.heads, by_pixels.heads)
    torch.testing.assert_close(folder.heads[:3], by_path.heads, rtol=1e-4, atol=1e-5)
    assert by_path.check() <= 1e-5


def test_words_of_a_text_share_its_embedding() -> None:
    model = mm.load("tiny-clip")
    found = decompose(model, texts=["a red circle", "a blue square on a white background"])
    assert found.check() <= 1e-5
    # Padding comes after the end token, and a causal tower does not look ahead.
    length = len(model.text.to_tokens("a red circle")[0])
    assert found.heads[0, :, length:].abs().max() == 0
    assert found.heads[0, :, :length].abs().max() > 0


def test_a_record_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    built = tiny.clip()
    found = decompose(mm.HookedModel(built.model), images=pixels_of(built))
    back = Decomposition.load(found.save(tmp_path / "found.safetensors"))
    assert torch.equal(back.heads, found.heads)
    assert back.grid == (2, 2)
    assert back.shares == "exact"


def test_what_cannot_be_decomposed_is_said() -> None:
    built = tiny.clip()
    model = mm.HookedModel(built.model)
    with pytest.raises(mm.InputError, match="images or texts, one of the two"):
        decompose(model)
    with pytest.raises(mm.InputError, match="width 3"):
        decompose(model, images=pixels_of(built), onto=torch.zeros(2, 3))
    siglip = tiny.siglip()
    with pytest.raises(mm.InputError, match="pools by attention"):
        decompose(mm.HookedModel(siglip.model), images=pixels_of(siglip), shares="uniform")
    with pytest.raises(mm.MissingSiteError, match="pooled by each"):
        decompose(
            mm.HookedModel(tiny.llama().model), texts={"input_ids": torch.ones(1, 3).long()}, tower="language"
        )
    unet = tiny.unet()
    with pytest.raises(mm.MissingSiteError, match="denoiser"):
        decompose(mm.HookedModel(unet.model), images=unet.inputs["sample"], tower="denoiser")


@pytest.mark.parametrize("engine", [mm.HookedModel, TracedModel])
@pytest.mark.parametrize(
    ("name", "side", "reason"),
    [
        ("coca", "images", r"vision.pool.attn.hook_pattern is out of reach"),
        ("coca", "texts", "divides its summary by its length"),
        ("open_clip_timm_siglip", "images", r"vision.pool.attn.hook_pattern is out of reach"),
        ("siglip2", "images", r"vision.pool.attn.hook_pattern is out of reach"),
        ("altclip", "texts", r"text.ln_final.hook_scale is out of reach: each block normalises"),
        ("chinese_clip", "texts", r"text.ln_final.hook_scale is out of reach: each block normalises"),
        ("open_clip_average", "images", "pooled by mean"),
        ("open_clip_resnet", "images", r"vision.blocks.0.attn.hook_v is out of reach"),
        ("align", "images", r"vision.blocks.0.attn.hook_v is out of reach"),
        ("timm_vit_average", "images", r"vision.ln_final.hook_scale is out of reach.*ln_pooled"),
        ("beit_classifier", "images", r"vision.ln_final.hook_scale is out of reach.*pool.ln"),
    ],
)
def test_a_tower_that_is_no_sum_is_refused_before_it_runs(
    name: str, side: str, reason: str, engine: Any
) -> None:
    built = tiny.CASES[name]()
    for module in built.model.modules():
        module.register_forward_pre_hook(lambda *_: pytest.fail("The model ran."))
    inputs = {k: v for k, v in built.inputs.items() if (k in TEXT_ARGUMENTS) == (side == "texts")}
    with pytest.raises(mm.MissingSiteError, match=reason):
        decompose(engine(built.model), **{side: inputs})
