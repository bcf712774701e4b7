"""The public seam: both engines are a `mm.Model`, and a tower says what methods ask of it."""

from __future__ import annotations

import inspect
import typing
from typing import Any

import pytest
import tiny
import torch

import mm_adapters as mm
from mm_adapters.zoo import sample_images

ENGINES = ("hooked", "nnsight")


def members() -> set[str]:
    """What the protocol asks for."""
    return {name for name in vars(mm.Model) | vars(mm.Lens) if not name.startswith("_")}


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-llava", "tiny-sd"])
def test_both_engines_say_the_same_of_a_loaded_model(name: str) -> None:
    hooked, traced = (mm.load(name, engine=engine) for engine in ENGINES)
    for model in (hooked, traced):
        assert isinstance(model, mm.Model)
        assert model.name == name
        assert members() <= set(dir(model))
    assert hooked.kind == traced.kind
    assert hooked.record is traced.record
    assert list(hooked.towers) == list(traced.towers)
    assert hooked.loops() == traced.loops()
    assert hooked.sites("*") == traced.sites("*")
    assert (hooked.device, hooked.dtype) == (traced.device, traced.dtype)
    assert hooked.preparer is not None
    assert traced.preparer is not None
    assert type(hooked.preparer) is type(traced.preparer)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_wrapped_model_is_called_by_its_family(engine: str) -> None:
    model = mm.wrap(tiny.clip().model, engine=engine)
    assert isinstance(model, mm.Model)
    assert (model.name, model.kind) == ("clip", "contrastive")
    assert model.check_site("vision.blocks.1.attn.hook_z").axes[2] == "head=4"
    with pytest.raises(mm.MissingSiteError, match=r"nearest are vision\.blocks\.1\.attn\.hook_z"):
        model.check_site("vision.blocks.1.attn.hook_zz")
    with pytest.raises(mm.MissingSiteError, match=r"no site 'visoin'\. Towers: vision, text"):
        model.check_tower("visoin")


@pytest.mark.parametrize("engine", ENGINES)
def test_prompts_are_laid_out_alike(engine: str) -> None:
    model = mm.load("tiny-sd", engine=engine)
    layout = model.prompt_layout("text", ["a red circle"])
    assert [word.text for word in layout.words[0]] == ["a", "red", "circle"]
    assert layout.n_rows == 1
    assert len(layout.roles[0]) == model.towers["text"].context_length


def test_an_editor_learns_from_the_engine_what_load_and_wrap_give() -> None:
    for function in (mm.load, mm.wrap):
        by_engine: dict[Any, Any] = {}
        for overload in typing.get_overloads(function):
            engine = inspect.signature(overload).parameters["engine"].annotation
            by_engine[engine] = inspect.signature(overload).return_annotation
        assert by_engine["Literal['hooked']"] == "HookedModel"
        assert by_engine["Literal['nnsight']"] == "TracedModel"
        assert by_engine["str"] == "HookedModel | TracedModel"


def test_a_towers_summary_is_the_models_own_embedding() -> None:
    model = mm.load("tiny-clip")
    inputs = model.prepare(text=["a red circle", "a blue square"], images=list(sample_images().values())[:2])
    output = model.run(inputs).output
    for tower, own in (("vision", output.image_embeds), ("text", output.text_embeds)):
        view = model.towers[tower]
        alone = model.run({view.input_name: inputs[view.input_name]}).output
        summary = view.summary(alone)
        assert torch.allclose(summary / summary.norm(dim=-1, keepdim=True), own, atol=1e-6)


def test_norm_and_projection_take_the_stream_to_the_summary() -> None:
    model = mm.load("tiny-clip")
    pixels = model.prepare(images=list(sample_images().values())[:2])["pixel_values"]
    view = model.towers["vision"]
    last = f"vision.blocks.{view.n_layers() - 1}.hook_resid_post"
    run = model.run({"pixel_values": pixels}, read=[last])
    norm, projection = view.final_norm, view.projection
    assert norm is not None
    assert norm.kind == "LN"
    assert projection is not None
    stream = run[last][:, 0]
    normalised = (stream - stream.mean(-1, keepdim=True)) / (
        stream.var(-1, correction=0, keepdim=True) + 1e-5
    ).sqrt()
    by_hand = (normalised * norm.gain + norm.bias) @ projection
    assert torch.allclose(by_hand, view.summary(run.output), atol=1e-5)


def test_weights_of_a_layer_are_those_of_the_transformer_lens_view() -> None:
    model = mm.load("tiny-llava")
    view = model.towers["language"]
    for name in ("W_Q", "W_K", "W_V", "W_O"):
        assert torch.equal(view.weights(1).names("attn")[name](), getattr(model.language, name)[1])
    with pytest.raises(mm.MissingSiteError, match="no layer 99 in blocks"):
        view.weights(99)
    with pytest.raises(mm.MissingSiteError, match="no stack 'layers'; its stacks: blocks"):
        view.block(0, "layers")


def test_vocabulary_logits_are_those_of_a_language_tower_only() -> None:
    model = mm.load("tiny-llava")
    inputs = model.prepare(text=["what colour is it?"], images=[next(iter(sample_images().values()))])
    output = model.run(inputs).output
    assert torch.equal(model.towers["language"].vocabulary_logits(output), output.logits)
    with pytest.raises(mm.MissingSiteError, match="vision tower has no unembedding"):
        model.towers["vision"].vocabulary_logits(output)


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2_registers", "vit"])
def test_a_towers_patch_layout_is_the_models(name: str) -> None:
    case = tiny.CASES[name]()
    model = mm.wrap(case.model)
    pixels = case.inputs["pixel_values"]
    view = model.towers["vision"]
    layout = view.patch_layout(pixels)
    of_model = model.layout(pixel_values=pixels)["vision"]
    assert (layout.roles, layout.patches, layout.grid) == (of_model.roles, of_model.patches, of_model.grid)
    rows, columns = view.patch_grid(pixels)
    assert layout.roles[0].count("patch") == rows * columns
    run = model.run({view.input_name: pixels}, read=["vision.blocks.0.hook_resid_pre"])
    assert run["vision.blocks.0.hook_resid_pre"].shape[1] == len(layout.roles[0])


def test_a_tower_without_patches_says_so() -> None:
    model = mm.load("tiny-clip")
    with pytest.raises(mm.MissingSiteError, match="text tower's layout has no 'patch' role"):
        model.towers["text"].patch_layout(torch.zeros(1, 3, 8, 8))
