"""The last token of a padded row is the last that is attended to: a row says what it says by itself."""

from __future__ import annotations

from typing import Any

import padded
import pytest
import tiny
import torch

import mm_adapters as mm
from methods_multimodal.lenses import attribute_tokens, logit_lens
from methods_multimodal.patching.activation_patching import patch_positions
from methods_multimodal.relevance import head_maps
from mm_adapters.tokens.layout import vision_layout
from mm_adapters.traced import TracedModel

ENGINES = {"hooked": mm.HookedModel, "nnsight": TracedModel}
each_engine = pytest.mark.parametrize("engine", ENGINES)
each_side = pytest.mark.parametrize("side", ["left", "right"])
each_family = pytest.mark.parametrize("name", padded.FAMILIES)


def made(name: str, engine: str) -> Any:
    return ENGINES[engine](tiny.CASES[name]().model)


@each_engine
@each_side
@each_family
def test_a_padded_row_has_the_lens_that_it_has_alone(name: str, side: str, engine: str) -> None:
    model, both = made(name, engine), padded.ragged(name, side)
    found = logit_lens(model, both, final_norm=True)
    before = logit_lens(model, both, final_norm=True, position=-2)
    assert not torch.equal(found.scores, before.scores)
    for row in range(2):
        own = padded.alone(both, row)
        last = model.wrapped(**own).logits[0, -2:].detach()
        torch.testing.assert_close(found.scores[row, -1], last[1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(before.scores[row, -1], last[0], rtol=1e-4, atol=1e-4)
        every = logit_lens(model, own, final_norm=True, position=own["input_ids"].shape[1] - 1)
        torch.testing.assert_close(found.scores[row], every.scores[0], rtol=1e-4, atol=1e-4)


@each_engine
@each_side
@pytest.mark.parametrize("name", ["llava", "gemma3", "llava_siglip_qwen"])
def test_a_padded_row_has_the_shares_that_it_has_alone(name: str, side: str, engine: str) -> None:
    model, both = made(name, engine), padded.ragged(name, side)
    found = attribute_tokens(model, both, [5, 9])
    for row in range(2):
        own = padded.alone(both, row)
        logits = model.wrapped(**own).logits[0, -1, [5, 9]].detach()
        torch.testing.assert_close(found.logit[row], logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.total[row], logits, rtol=1e-4, atol=1e-4)
        by_itself = attribute_tokens(model, own, [5, 9])
        torch.testing.assert_close(found.heads[row], by_itself.heads[0], rtol=1e-4, atol=1e-4)


@each_engine
@pytest.mark.parametrize("name", ["llava", "gemma3", "blip_2"])
def test_the_last_tokens_map_is_that_of_the_row_alone(name: str, engine: str) -> None:
    model, both = made(name, engine), padded.ragged(name, "right")
    layout = vision_layout(2, (1, 3), n_class=1)  # Which positions are shown is not what is tested.
    every: dict[str, Any] = {"tower": "language", "layers": [0, 1], "query": -1}
    found = head_maps(model, both, layout, **every)
    for row in range(2):
        own = head_maps(model, padded.alone(both, row), vision_layout(1, (1, 3), n_class=1), **every)
        torch.testing.assert_close(found.maps[row], own.maps[0], rtol=1e-4, atol=1e-5)


@each_side
@pytest.mark.parametrize("name", ["llava", "gemma3", "llava_siglip_qwen"])
def test_patching_the_last_position_patches_each_rows_own(name: str, side: str) -> None:
    model, corrupted = made(name, "hooked"), padded.ragged(name, side)
    ids = corrupted["input_ids"]
    words = (ids > 2) & (ids < 59)
    clean = corrupted | {"input_ids": torch.where(words, (ids * 7) % 50 + 3, ids)}
    mask = corrupted["attention_mask"]
    last = torch.tensor([row.nonzero().max() for row in mask])

    def metric(output: Any) -> torch.Tensor:
        rows = torch.arange(len(output.logits))
        return output.logits[rows, last.repeat(len(rows) // 2), 7]

    found = patch_positions(
        model, clean, corrupted, metric, tower="language", layers=[1], units=[(-1,), (-1, -2)]
    )
    block = model.wrapped.model.language_model.layers[1]
    seen: list[torch.Tensor] = []
    with torch.no_grad():
        handle = block.register_forward_pre_hook(lambda m, a: seen.append(a[0].clone()))
        model.wrapped(**clean)
        handle.remove()
        for unit, back in enumerate([1, 2]):

            def put(module: Any, args: Any, n: int = back) -> Any:
                value = args[0].clone()
                for row in range(2):
                    own = mask[row].nonzero()[-n:, 0]
                    value[row, own] = seen[0][row, own]
                return (value, *args[1:])

            handle = block.register_forward_pre_hook(put)
            want = metric(model.wrapped(**corrupted))
            handle.remove()
            torch.testing.assert_close(found.patched[:, 0, unit], want, rtol=1e-5, atol=1e-5)


def test_a_vision_towers_last_position_is_no_padding() -> None:
    model = made("siglip2", "hooked")
    inputs = tiny.CASES["siglip2"]().inputs
    pixels = {k: v[1:] for k, v in inputs.items() if "pixel" in k or k == "spatial_shapes"}
    layout = model.layout(**pixels)["vision"]
    n = sum(role != "pad" for role in layout.roles[0])
    found = head_maps(model, pixels, layout, tower="vision", layers=[0], query=-1)
    site = "vision.blocks.0.attn.hook_pattern"
    pattern = model.run(pixels, read=[site])[site]
    assert n < pattern.shape[-1]
    assert torch.equal(found.maps[0, 0].flatten(1), pattern[0, :, n - 1, :n])


@each_engine
def test_what_no_row_has_is_refused_before_the_model_runs(engine: str) -> None:
    model, both = made("llava", engine), padded.ragged("llava", "left")
    for module in model.wrapped.modules():
        module.register_forward_pre_hook(lambda *_: pytest.fail("The model ran."))
    deep = both | {"attention_mask": torch.ones(2, 1, 10, 10)}
    for inputs, position, said in (
        (both, -9, "no position -9: row 1 attends to 8 positions"),
        (both, 10, "no position 10: the rows have positions 0 to 9"),
        (deep, -1, r"attention_mask is \[2, 1, 10, 10\]"),
        ({"pixel_values": both["pixel_values"]}, -1, "no input_ids here"),
    ):
        with pytest.raises(mm.InputError, match=said):
            logit_lens(model, inputs, final_norm=True, position=position)
        with pytest.raises(mm.InputError, match=said):
            attribute_tokens(model, inputs, [5], position=position)
    with pytest.raises(mm.InputError, match="row 1 attends to 8"):
        patch_positions(
            model, both, both, lambda o: o.logits[:, 0, 0], tower="language", layers=[0], units=[(-9,)]
        )
