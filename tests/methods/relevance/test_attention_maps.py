"""Attention as maps: the model's own weights, at the places of the patches."""

from __future__ import annotations

import pytest
import tiny
import torch

import mm_adapters as mm
from methods_multimodal.core.grids import answer_layout, image_layout
from methods_multimodal.relevance.attention_maps import HeadMaps, _query, head_maps
from mm_adapters.tokens.layout import vision_layout


def test_class_maps_equal_the_librarys_own_attentions() -> None:
    built = tiny.clip_vision()
    layout = image_layout(mm.HookedModel(built.model), built.inputs["pixel_values"])
    found = head_maps(mm.HookedModel(built.model), built.inputs, layout, tower="vision", layers=range(3))
    built.model.set_attn_implementation("eager")
    with torch.no_grad():
        own = built.model(**built.inputs, output_attentions=True).attentions
    for layer in range(3):
        expected = own[layer][:, :, 0, 1:].unflatten(-1, (2, 2))
        torch.testing.assert_close(found.maps[:, layer], expected, rtol=1e-5, atol=1e-6)


def test_rows_of_patches_run_downwards_on_a_picture_that_is_not_square() -> None:
    built = tiny.clip_vision()
    wide = torch.randn(1, 3, 28, 42)
    given = {"pixel_values": wide, "interpolate_pos_encoding": True}
    model = mm.HookedModel(built.model)
    layout = image_layout(model, wide)
    assert layout.grid == (2, 3)
    found = head_maps(model, given, layout, tower="vision", layers=[0])
    pattern = model.run(given, read=["vision.blocks.0.attn.hook_pattern"])[
        "vision.blocks.0.attn.hook_pattern"
    ]
    assert torch.equal(found.maps[0, 0, :, 1, 0], pattern[0, :, 0, 1 + 3])


def test_the_last_tokens_map_covers_the_image_tokens() -> None:
    built = tiny.llava()
    model = mm.HookedModel(built.model)
    # One start token, four image tokens, five words: the layout of a class token and four patches.
    layout = vision_layout(2, (2, 2), n_class=1)
    found = head_maps(
        model, built.inputs, layout, tower="language", layers=[1], query=-1, query_name="last token"
    )
    site = "language.blocks.1.attn.hook_pattern"
    pattern = model.run(built.inputs, read=[site])[site]
    torch.testing.assert_close(found.maps[:, 0], pattern[:, :, -1, 1:5].unflatten(-1, (2, 2)))


def test_the_image_tokens_of_an_answer_are_where_the_image_is() -> None:
    import tiny_tokenizers

    built = tiny.llava()
    ids = built.inputs["input_ids"]
    model = mm.wrap(built.model, tokenizer=tiny_tokenizers.llama())
    layout = answer_layout(model, ids, built.inputs["attention_mask"], built.inputs["pixel_values"])
    assert layout.grid == (2, 2)
    assert layout.positions("image") == [1, 2, 3, 4]
    assert layout.patch_rc(3) == (1, 0)


def test_a_mosaic_has_layers_downwards_and_heads_across() -> None:
    built = tiny.clip_vision()
    model = mm.HookedModel(built.model)
    layout = image_layout(model, built.inputs["pixel_values"])
    found = head_maps(model, built.inputs, layout, tower="vision", layers=range(3))
    mosaic = found.mosaic(1)
    assert torch.equal(mosaic[2:4, 6:8], found.maps[1, 1, 3])


def test_a_sequence_without_patches_is_refused_before_the_model_runs() -> None:
    built = tiny.llava()
    for module in built.model.modules():
        module.register_forward_pre_hook(lambda *_: pytest.fail("The model ran."))
    layout = mm.TokenLayout((("start", "word"), ("start", "word")))
    with pytest.raises(mm.MissingSiteError, match="no 'patch' role"):
        head_maps(mm.HookedModel(built.model), built.inputs, layout, tower="language", layers=[0])


def test_a_mean_is_over_heads() -> None:
    maps = torch.arange(2 * 1 * 3 * 2 * 2.0).reshape(2, 1, 3, 2, 2)
    found = HeadMaps(maps, "it", (0,))
    assert torch.equal(found.mean[1, 0], (maps[1, 0, 0] + maps[1, 0, 1] + maps[1, 0, 2]) / 3)


def test_a_position_counted_back_is_one_that_is_no_padding() -> None:
    model = mm.HookedModel(tiny.clip_vision().model)
    layout = mm.TokenLayout((("class", *["patch"] * 4, "pad"),))
    assert _query(model, {}, layout, -1, "vision").index == 4
    assert _query(model, {}, layout, -5, "vision").index == 0
    with pytest.raises(mm.InputError, match=r"^query=-6: the rows of vision have 5 positions\.$"):
        _query(model, {}, layout, -6, "vision")
