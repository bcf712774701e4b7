"""A read or a hook that never ran is an error, as an edit is."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

import mm_adapters as mm
from tests.runs.watched import ENGINES

TEXT_ONLY = {"clip": "vision.hook_embed", "siglip": "vision.blocks.0.hook_resid_post"}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", TEXT_ONLY)
def test_a_tower_that_the_inputs_do_not_use(name: str, engine: Any) -> None:
    case = tiny.CASES[name]()
    texts = {k: v for k, v in case.inputs.items() if k != "pixel_values"}
    model, site = mm.wrap(case.model, engine=engine), TEXT_ONLY[name]
    with pytest.raises(mm.ReadNeverFiredError, match="inputs"):
        model.run(texts, read=[site, "text.blocks.0.hook_resid_post"])
    with pytest.raises(mm.EditNeverFiredError, match="never fired"):
        model.run(texts, edit=[mm.Edit(site, torch.zeros_like)])


@pytest.mark.parametrize("engine", ENGINES)
def test_images_of_a_language_model_asked_without_any(engine: Any) -> None:
    case = tiny.llava()
    tokens = {"input_ids": torch.tensor([[1, 5, 6]])}
    model = mm.wrap(case.model, engine=engine)
    assert model.run(tokens).output.logits.shape[1] == 3
    with pytest.raises(mm.ReadNeverFiredError, match=r"vision\.hook_embed"):
        model.run(tokens, read=["vision.hook_embed"])


def test_the_unconditional_half_of_an_unguided_run() -> None:
    case = tiny.CASES["stable_diffusion"]()
    read = mm.Read("denoiser.hook_out", rows="uncond")
    with pytest.raises(mm.InputError, match="guidance_scale"):
        mm.wrap(case.model).run(case.inputs | {"guidance_scale": 1.0}, read=[read])


def test_names_of_a_cache_and_hooks_must_run_and_filters_need_not() -> None:
    model = mm.HookedModel(tiny.llava().model)
    tokens = torch.tensor([[1, 5, 6]])
    vision, language = "vision.hook_embed", "language.blocks.0.hook_resid_post"
    called: list[str] = []

    def note(value: Any, hook: Any) -> None:
        called.append(hook.name)

    for names in (vision, [language, vision]):
        with pytest.raises(mm.ReadNeverFiredError, match=vision):
            model.run_with_cache(input_ids=tokens, names_filter=names)
    _, cache = model.run_with_cache(
        input_ids=tokens, names_filter=lambda name: name.endswith(("hook_embed", "blocks.0.hook_resid_post"))
    )
    assert language in cache
    assert vision not in cache
    with pytest.raises(mm.ReadNeverFiredError, match=vision):
        model.run_with_hooks(input_ids=tokens, fwd_hooks=[(language, note), (vision, note)])
    with pytest.raises(mm.ReadNeverFiredError, match="function"):
        model.run_with_hooks(input_ids=tokens, fwd_hooks=[(lambda name: name == vision, note)])
    model.run_with_hooks(input_ids=tokens, fwd_hooks=[(language, note)])
    assert called == [language, language]


def test_a_hook_of_a_tower_must_run_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mm.HookedModel(tiny.llava().model)

    def nothing(value: Any, hook: Any) -> None:
        raise AssertionError("was called")

    tower = model.language
    # A forward that comes by no site.
    monkeypatch.setattr(type(tower), "forward", lambda self, *args, **kwargs: None)
    with pytest.raises(mm.ReadNeverFiredError, match=r"blocks\.0\.hook_resid_post"):
        tower.run_with_hooks(torch.tensor([[1, 5]]), fwd_hooks=[("blocks.0.hook_resid_post", nothing)])
    with pytest.raises(mm.ReadNeverFiredError, match=r"blocks\.0\.hook_resid_post"):
        tower.run_with_cache(torch.tensor([[1, 5]]), names_filter=["blocks.0.hook_resid_post"])


def test_of_an_unguided_loop_a_name_is_read() -> None:
    case = tiny.CASES["stable_diffusion"]()
    model = mm.HookedModel(case.model)
    with pytest.raises(mm.MissingSiteError):
        model.run_with_cache(**case.inputs, names_filter=["denoiser.blocks.99.hook_resid_post"])
    unguided = case.inputs | {"guidance_scale": 1.0}
    name = "denoiser.blocks.0.cross_attn.hook_z"
    _, cache = model.run_with_cache(**unguided, names_filter=[name])
    assert list(cache) == [name]
