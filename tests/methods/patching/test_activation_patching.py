"""Activation patching: as TransformerLens patches, and by hand."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tiny
import torch
from torch import Tensor
from transformer_lens import patching

import mm_adapters as mm
from methods_multimodal.patching.activation_patching import _place, patch_heads, patch_positions, patch_units
from mm_adapters import StoreError


def pair(name: str) -> tuple[tiny.Case, dict[str, Tensor], dict[str, Tensor]]:
    """A case, and two inputs of one row each that differ."""
    built = tiny.CASES[name]()
    first, second = ({k: v[[i]] for k, v in built.inputs.items()} for i in (0, 1))
    return built, first, second


def first_number(output: Any) -> Tensor:
    summary = output.pooler_output if hasattr(output, "pooler_output") else output.last_hidden_state[:, -1]
    return summary[:, 0] - summary[:, 1]


@pytest.mark.parametrize(
    ("name", "tower", "key"), [("clip_vision", "vision", "pixel_values"), ("llama", "language", "input_ids")]
)
def test_patching_heads_and_positions_equals_transformer_lens(name: str, tower: str, key: str) -> None:
    built, clean, corrupted = pair(name)
    model = mm.HookedModel(built.model)
    view = model.tower(tower)

    def metric(summary: Tensor) -> Tensor:
        last = summary if name == "clip_vision" else summary[:, -1]
        return last[0, 0] - last[0, 1]

    with torch.no_grad():
        _, cache = view.run_with_cache(clean[key])
        heads = patching.get_act_patch_attn_head_out_all_pos(view, corrupted[key], cache, metric)
        n_pos = cache["resid_pre", 0].shape[1]
        index = pd.DataFrame([(i, p) for i in range(3) for p in range(n_pos)], columns=["layer", "pos"])
        flat = patching.generic_activation_patch(
            view, corrupted[key], cache, metric, patching.layer_pos_patch_setter, "resid_pre", index_df=index
        )
    every: dict[str, Any] = {"tower": tower, "layers": range(3)}
    ours = patch_heads(model, clean, corrupted, first_number, **every)
    torch.testing.assert_close(ours.patched[0], heads, rtol=1e-5, atol=1e-6)
    ours = patch_positions(model, clean, corrupted, first_number, **every)
    torch.testing.assert_close(ours.patched[0].flatten(), flat, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_how_many_share_a_run_does_not_matter(batch: int) -> None:
    built, clean, corrupted = pair("clip_vision")
    model = mm.HookedModel(built.model)
    run = functools.partial(patch_heads, model, clean, corrupted, first_number, tower="vision", layers=[0, 2])
    torch.testing.assert_close(run(batch=batch).patched, run(stacked=()).patched, rtol=1e-5, atol=1e-6)


def test_patching_an_input_with_itself_changes_nothing() -> None:
    built, clean, _ = pair("clip_vision")
    model = mm.HookedModel(built.model)
    found = patch_heads(model, clean, clean, first_number, tower="vision", layers=range(3))
    torch.testing.assert_close(found.patched, found.clean.expand_as(found.patched), rtol=1e-5, atol=1e-6)
    with pytest.raises(mm.InputError, match="same for both inputs"):
        _ = found.effect


def test_patching_every_position_at_once_restores_the_clean_run() -> None:
    built, clean, corrupted = pair("clip_vision")
    found = patch_positions(
        mm.HookedModel(built.model),
        clean,
        corrupted,
        first_number,
        tower="vision",
        layers=range(3),
        units=[list(range(5))],
    )
    torch.testing.assert_close(found.effect, torch.ones(1, 3, 1), rtol=1e-4, atol=1e-4)


def test_only_the_image_is_stacked_where_texts_have_rows_of_their_own() -> None:
    built, (a, b) = tiny.clip(), tiny.pixels().split(1)
    model, words = mm.HookedModel(built.model), tiny.clip_text_ids()

    def metric(output: Any) -> Tensor:
        return output.logits_per_image[:, 0] - output.logits_per_image[:, 1]

    every: dict[str, Any] = {"tower": "vision", "layers": range(3)}
    one, two = {**words, "pixel_values": a}, {**words, "pixel_values": b}
    found = patch_heads(model, one, two, metric, stacked={"pixel_values"}, **every)
    alone = patch_heads(model, one, two, metric, stacked=(), **every)
    torch.testing.assert_close(found.patched, alone.patched, rtol=1e-4, atol=1e-5)


def test_inputs_of_different_shape_are_refused_before_a_run() -> None:
    built, clean, corrupted = pair("llama")
    shorter = {k: v[:, :-1] for k, v in corrupted.items()}
    with pytest.raises(mm.InputError, match=r"input_ids is \(1, 6\).*\(1, 5\)"):
        patch_heads(mm.HookedModel(built.model), clean, shorter, first_number, tower="language", layers=[0])


def test_images_that_lie_end_to_end_in_one_row_are_patched_one_by_one() -> None:
    built = tiny.CASES["pixtral"]()
    model = mm.HookedModel(built.model)
    first = {k: v[[0]] for k, v in built.inputs.items()}
    second = first | {"pixel_values": first["pixel_values"] + 1}

    def metric(output: Any) -> Tensor:
        return output.logits[:, -1, 0]

    found = patch_heads(model, first, second, metric, tower="vision", layers=[0])
    alone = patch_heads(model, first, second, metric, tower="vision", layers=[0], stacked=())
    assert torch.equal(found.patched, alone.patched)
    assert bool((found.patched != found.corrupted[:, None, None]).any())


@pytest.mark.parametrize(("name", "tower"), [("clip_vision", "vision"), ("llava", "language")])
def test_a_head_below_zero_is_counted_from_the_last(name: str, tower: str) -> None:
    built, clean, corrupted = pair(name)
    model = mm.HookedModel(built.model)
    site = f"{tower}.blocks.{{}}.attn.hook_z"

    def metric(output: Any) -> Tensor:
        return built.head(output).flatten(1)[:, 3]

    every: dict[str, Any] = {"tower": tower, "layers": [1]}
    by_number = patch_heads(model, clean, corrupted, metric, **every)
    for unit, head in ((-1, 3), (-4, 0)):
        found = patch_units(model, clean, corrupted, metric, site, "head", units=[(unit,)], layers=[1])
        assert torch.equal(found.patched[:, 0, 0], by_number.patched[:, 0, head])
        assert found.units == ((unit,),)
    for wrong in (-5, 4):
        with pytest.raises(mm.InputError, match=f"no unit {wrong}: .* has units 0 to 3"):
            patch_units(model, clean, corrupted, metric, site, "head", units=[(wrong,)], layers=[1])


def test_inputs_without_a_row_for_each_row_are_run_one_unit_at_a_time() -> None:
    built = tiny.CASES["unet"]()
    model = mm.HookedModel(built.model)
    corrupted = dict(built.inputs) | {"timestep": torch.tensor([7])}  # One for both rows.
    clean = corrupted | {"sample": corrupted["sample"].flip(0)}
    site = "denoiser.blocks.1.hook_resid_pre"

    def metric(output: Any) -> Tensor:
        return output.sample[:, 0, 0, 0]

    units = [(0,), (2, 3)]
    found = patch_units(
        model, clean, corrupted, metric, "denoiser.blocks.{}.hook_resid_pre", "pos", units=units, layers=[1]
    )
    value = model.run(clean, read=[site])[site]
    for i, unit in enumerate(units):

        def put(here: Tensor, unit: tuple[int, ...] = unit) -> Tensor:
            return value[:, list(unit)]

        run = model.run(corrupted, edit=[mm.Edit(site, put, positions=unit)])
        torch.testing.assert_close(found.patched[:, 0, i], metric(run.output), rtol=1e-5, atol=1e-6)


def test_patching_that_was_stopped_goes_on_at_its_run_and_other_work_is_refused(tmp_path: Path) -> None:
    built, clean, corrupted = pair("clip_vision")
    model, ran = mm.HookedModel(built.model), []
    run, stop_at = model.run, -1

    def stopping(*args: Any, **kwargs: Any) -> Any:
        ran.append(len(ran) + 1)
        if len(ran) == stop_at:
            raise KeyboardInterrupt
        return run(*args, **kwargs)

    model.run = stopping
    every: dict[str, Any] = {"tower": "vision", "layers": range(3), "batch": 4}
    metric, folder = first_number, tmp_path / "work"
    whole = patch_positions(model, clean, corrupted, metric, **every)
    stop_at = len(ran) - 2  # Three are left.
    ran.clear()
    with pytest.raises(KeyboardInterrupt):
        patch_positions(model, clean, corrupted, metric, folder=folder, **every)
    stop_at = -1
    ran.clear()
    found = patch_positions(model, clean, corrupted, metric, folder=folder, **every)
    # The two runs that it compares, and what was left.
    assert len(ran) == 2 + 3
    assert torch.equal(found.patched, whole.patched)
    for changed in ({"layers": range(2)}, {"batch": 3}, {"units": [(0,), (1, 2)]}):
        with pytest.raises(StoreError, match="differ"):
            patch_positions(model, clean, corrupted, metric, folder=folder, **(every | changed))
    with pytest.raises(StoreError, match="data"):
        patch_positions(model, corrupted, clean, metric, folder=folder, **every)
    with pytest.raises(StoreError, match="metric"):
        patch_positions(model, clean, corrupted, lambda o: 2 * first_number(o), folder=folder, **every)


def test_positions_of_a_decoder_stack_are_counted_from_its_first() -> None:
    model = mm.HookedModel(tiny.clip().model)
    inputs = tiny.clip_text_ids()
    site = "text.decoder.0.hook_resid_pre"
    with pytest.raises(mm.InputError, match=f"^units: the positions of {site} are counted from 0, not -1"):
        _place(model, inputs, -1, site, "pos")
    assert int(_place(model, inputs, 0, site, "pos")) == 0
    assert int(_place(model, inputs, -1, site, "head")) == -1
    assert _place(model, inputs, -1, "text.blocks.0.hook_resid_pre", "pos").tolist() == [4, 2]
