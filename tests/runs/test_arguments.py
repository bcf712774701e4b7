"""What is no argument at all is an error of ours, before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

import mm_adapters as mm
from tests.runs.watched import ENGINES, never_called

SITE = "language.blocks.0.hook_resid_post"


@pytest.fixture(scope="module")
def case() -> tiny.Case:
    return tiny.llava()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("inputs", [[1, 2], "a", {1: 2}, None, 3])
def test_inputs_are_named(case: tiny.Case, inputs: Any, engine: Any) -> None:
    with never_called(case.model), pytest.raises(mm.InputError, match="dictionary"):
        mm.wrap(case.model, engine=engine).run(inputs, read=[SITE])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("grad_of", [3, "loss", torch.ones(())])
def test_grad_of_is_a_function(case: tiny.Case, grad_of: Any, engine: Any) -> None:
    with never_called(case.model), pytest.raises(mm.InputError, match="function"):
        mm.wrap(case.model, engine=engine).run(case.inputs, read=[SITE], grad_of=grad_of)


@pytest.mark.parametrize("site", [None, 3, ["language.hook_embed"]])
def test_a_site_is_a_name(site: Any) -> None:
    with pytest.raises(mm.InputError, match="by its name"):
        mm.Read(site)
    with pytest.raises(mm.InputError, match="by its name"):
        mm.Edit(site, torch.zeros_like)


@pytest.mark.parametrize("whole", [True, False])
def test_filters_and_hooks_are_what_transformer_lens_takes(case: tiny.Case, whole: bool) -> None:
    model = mm.HookedModel(case.model)
    where: Any = model if whole else model.language
    name = SITE if whole else SITE.removeprefix("language.")
    arguments = case.inputs if whole else {"input": case.inputs["input_ids"]}
    with never_called(case.model), pytest.raises(mm.InputError, match="names_filter"):
        where.run_with_cache(**arguments, names_filter=[3])
    for hooks in ([name], [(name, 3)], [(name,)]):
        with never_called(case.model), pytest.raises(mm.InputError, match="fwd_hooks"):
            where.run_with_hooks(**arguments, fwd_hooks=hooks)


@pytest.mark.parametrize("whole", [True, False])
def test_a_cache_is_kept_on_a_device_that_there_is(case: tiny.Case, whole: bool) -> None:
    model = mm.HookedModel(case.model)
    where: Any = model if whole else model.language
    arguments = case.inputs if whole else {"input": case.inputs["input_ids"]}
    with never_called(case.model), pytest.raises(mm.InputError, match="nosuch"):
        where.run_with_cache(**arguments, device="nosuch")


def test_texts_or_images_alone_are_cached_by_their_tower() -> None:
    model = mm.HookedModel(tiny.clip().model)
    inputs = tiny.clip().inputs
    site = "text.blocks.1.hook_resid_post"
    texts = {k: v for k, v in inputs.items() if k != "pixel_values"}
    _, cache = model.run_with_cache(**texts, names_filter=[site])
    assert torch.equal(cache[site], model.run(inputs, read=[site])[site])
    with pytest.raises(mm.ReadNeverFiredError, match="vision"):
        model.run_with_cache(**texts, names_filter=["vision.hook_embed"])


@pytest.mark.parametrize("engine", ENGINES)
def test_tokens_of_no_length_are_refused(engine: Any) -> None:
    model = mm.load("tiny-clip", engine=engine)
    ready = model.prepare(text=["a", "b"])
    with never_called(model.wrapped), pytest.raises(mm.InputError, match="empty"):
        model.run(ready | {"input_ids": ready["input_ids"][:, :0]})


@pytest.mark.parametrize("engine", ENGINES)
def test_a_pipelines_layout_takes_its_own_name_for_the_text(engine: Any) -> None:
    model = mm.load("tiny-sd", engine=engine)
    named, given = model.layout(prompt=["a red circle"]), model.layout(text=["a red circle"])
    assert named["text"].where("red") == given["text"].where("red")
    with pytest.raises(mm.InputError, match="both"):
        model.layout(text=["a"], prompt=["b"])
    with pytest.raises(mm.InputError, match="tokens"):
        model.layout(prompt=["a red circle " * 60])
    with pytest.raises(mm.InputError, match="latents"):
        model.run({"prompt": "a", "latents": "noise"})


@pytest.mark.parametrize("engine", ENGINES)
def test_half_a_character_is_no_text(engine: Any) -> None:
    model = mm.load("tiny-clip", engine=engine)
    for call in (model.prepare, model.layout):
        with pytest.raises(mm.InputError, match="half a character"):
            call(text="\ud800")
