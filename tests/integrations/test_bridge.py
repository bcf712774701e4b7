"""The families this package gives to TransformerLens' own bridge."""

from __future__ import annotations

import copy
import inspect
import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_diffusion
import tiny_tokenizers
import torch
import transformers as hf
from torch import Tensor, nn
from transformer_lens.benchmarks import multimodal
from transformer_lens.benchmarks.vision import run_vision_benchmarks
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

import mm_adapters as mm
from integrations import transformer_lens as tl

ROOT = Path(__file__).parents[2]
# Those that no tiny model has in it: the tiny model of a class beside it is made of this one.
_BESIDE = {
    "UMT5EncoderModel": lambda: hf.UMT5EncoderModel(hf.UMT5Config(**_T5)),
    "XLMRobertaModel": lambda: hf.XLMRobertaModel(hf.XLMRobertaConfig(**_ROBERTA)),
}
_T5 = {"d_model": 24, "d_ff": 32, "d_kv": 8, "num_layers": 2, "num_heads": 3, "vocab_size": 60}
_ROBERTA = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 3,
    "vocab_size": 60, "max_position_embeddings": 18, "pad_token_id": 1,
}  # fmt: skip
each_class = pytest.mark.parametrize("name", tl.architectures())


class Stop(Exception):
    pass


@cache
def _tiny_models() -> dict[str, tuple[tiny.Case, nn.Module]]:
    """By class: the first tiny model that is one, or has one in it."""
    found: dict[str, tuple[tiny.Case, nn.Module]] = {}
    for name, make in tiny.CASES.items():
        if name in tiny_diffusion.CASES and name != "t5_encoder":
            continue
        case = make()
        if name != "blip_2_t5" and isinstance(case.model, nn.Module):
            for module in case.model.modules():
                found.setdefault(type(module).__name__, (case, module))
    return found


@cache
def given(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny model of a class, alone or inside another, and what it is called with there."""
    if name in _BESIDE:
        ids = torch.randint(3, 57, (2, 6), generator=torch.Generator().manual_seed(2))
        return tiny.seeded(_BESIDE[name]), {"input_ids": ids}
    assert name in _tiny_models(), (
        f"No tiny model of {name}, alone or in another: add one to tests/tiny_*.py."
    )
    case, found = _tiny_models()[name]
    calls: list[dict[str, Any]] = []

    def catch(module: nn.Module, args: Any, kwargs: Any) -> None:
        names = [*inspect.signature(type(module).forward).parameters][1:]
        calls.append(dict(zip(names, args, strict=False)) | kwargs)
        raise Stop

    handle = found.register_forward_pre_hook(catch, with_kwargs=True)
    with pytest.raises(Stop), torch.no_grad():
        case.model(**case.inputs)
    handle.remove()
    return found, {k: v for k, v in calls[0].items() if v is not None and k != "return_dict"}


def made(name: str, **options: Any) -> tuple[Any, Tensor, dict[str, Any]]:
    """A bridge over a copy, the first thing it is called with, and the rest."""
    model, inputs = given(name)
    rest = dict(inputs)
    first = rest.pop("pixel_values", None) if "input_ids" not in rest else rest.pop("input_ids")
    first = rest.pop("hidden_states") if first is None else first
    return tl.bridge(copy.deepcopy(model), **options), first, rest


def output_of(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return told(model(**inputs))


def told(output: Any) -> Tensor:
    """What a bridge takes for a model's answer."""
    for name in ("logits", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    return output


def test_the_entry_points_are_the_adapters_and_none_of_them_is_transformer_lens_own() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    points = project["entry-points"]["transformer_lens.architectures"]
    wanted = {name: f"{tl.__name__}:{name}" for name in tl.architectures()}
    lines = "\n".join(f'{name} = "{where}"' for name, where in wanted.items())
    assert points == wanted, f"pyproject.toml should have\n{lines}"
    assert not points.keys() & SUPPORTED_ARCHITECTURES.keys()
    assert all(issubclass(getattr(tl, name), tl.RecordAdapter) for name in points)


@each_class
def test_a_bridge_computes_what_the_model_does_bit_for_bit(name: str) -> None:
    model, inputs = given(name)
    bridge, first, rest = made(name)
    with torch.no_grad():
        assert torch.equal(told(bridge(first, **rest)), output_of(model, inputs))
    attention = bridge.blocks[0]._modules.get("attn")
    if hasattr(attention, "q"):
        assert attention.W_Q.shape == (bridge.cfg.n_heads, bridge.cfg.d_model, bridge.cfg.d_head)


@each_class
def test_its_cache_holds_every_site_as_the_other_road_reads_it(name: str) -> None:
    model, inputs = given(name)
    bridge, first, rest = made(name)
    hooked = mm.HookedModel(copy.deepcopy(model))
    run = hooked.run(inputs, read=list(hooked.sitemap.sites))
    with torch.no_grad():
        _, cache = bridge.run_with_cache(first, **rest)
    for site in hooked.sitemap.sites:
        value = cache[bridge.adapter.hook_name(site)]
        assert torch.equal(value.reshape(run[site].shape), run[site]), site


@each_class
def test_its_hooks_are_causal_and_leave_nothing_behind(name: str) -> None:
    model, inputs = given(name)
    bridge, first, rest = made(name)
    hooked = mm.HookedModel(copy.deepcopy(model))
    plain = output_of(model, inputs)
    # One of each part: the first block's, and of the whole tower.
    one_each = {re.sub(r"\d+", "0", site): site for site in reversed(list(hooked.sitemap.sites))}
    moved, fired = set(), set()

    def edit(value: Tensor, hook: Any) -> Tensor:
        fired.add(hook.name)
        return 1.3 * value + 0.1

    for site in one_each.values():
        edited = told(hooked.run(inputs, edit=[mm.Edit(site, lambda x: 1.3 * x + 0.1)]).output)
        fired.clear()
        with torch.no_grad():
            hooks = [(bridge.adapter.hook_name(site), edit)]
            found = told(bridge.run_with_hooks(first, fwd_hooks=hooks, **rest))
        assert fired, site
        assert torch.equal(found, edited), site
        if not torch.equal(found, plain):
            moved.add(site)
    # A pool comes after the states that are a tower's answer.
    assert len(moved) > 0.6 * sum(".pool." not in site for site in one_each.values())
    with torch.no_grad():
        assert torch.equal(told(bridge(first, **rest)), plain)


# --- TransformerLens' own benchmarks ----------------------------------------------------------

VISION = [n for n in tl.architectures() if "Vision" in n or n.startswith(("Beit", "DINO", "Dino", "IJepa"))]
WHOLE = [n for n in tl.architectures() if "ForConditionalGeneration" in n]
# What they give a tower is pixels and nothing else, one image of [3, height, width].
NOT_BY_PIXELS_ALONE = {
    "Siglip2VisionModel": "it takes a mask and shapes beside its patches",
    "MllamaVisionModel": "it takes aspect ratios beside its tiles",
    "Qwen2VisionTransformerPretrainedModel": "it takes grids beside its patches",
    "Qwen2_5_VisionTransformerPretrainedModel": "it takes grids beside its patches",
    "Qwen3VLVisionModel": "it takes grids beside its patches",
    "PixtralVisionModel": "it packs its images into one sequence, and they ask for one row an image",
}
# Its embedding is what no module gives: the positions are added to the patches between two.
SUMMED_IN_NO_MODULE = {"Molmo2VisionModel"}


@pytest.mark.parametrize("name", VISION)
def test_a_tower_passes_the_vision_benchmarks(name: str) -> None:
    bridge, pixels, _ = made(name)
    results = run_vision_benchmarks(bridge, pixels, verbose=False)
    failed = [r for r in results if not r.passed]
    if name in NOT_BY_PIXELS_ALONE:
        assert failed, f"{name} can go now"
        return
    assert len(results) == 5
    assert not failed, failed
    skipped = [r.name for r in results if r.severity.name == "SKIPPED"]
    # The last is for classifiers.
    assert skipped == ["vision_embeddings"] * (name in SUMMED_IN_NO_MODULE) + ["vision_classification_decode"]


class Processor:
    """Gives what the tiny model is called with, whatever it is asked for."""

    def __init__(self, inputs: dict[str, Any]) -> None:
        self.inputs = inputs
        self.tokenizer = tiny_tokenizers.llama()

    def __call__(self, **_: Any) -> dict[str, Any]:
        return dict(self.inputs)


# Their generation gives pixels on the first step only, and calls `forward` alone on the others.
NOT_GENERATED = {
    "Blip2ForConditionalGeneration": "its forward takes pixels on every step",
    "BlipForConditionalGeneration": "its forward takes pixels on every step",
    "InstructBlipForConditionalGeneration": "its forward takes pixels on every step",
    "Kosmos2ForConditionalGeneration": "its forward takes pixels on every step",
    "Qwen2VLForConditionalGeneration": "it takes the mask of all the text for one new word's positions",
}


# TransformerLens 4.3 hands its cache on by the name that transformers 5.24 gives up.
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", WHOLE)
def test_a_vision_language_model_passes_the_multimodal_benchmarks(name: str) -> None:
    bridge, _, _ = made(name, processor=Processor(given(name)[1]))
    results = [multimodal.benchmark_multimodal_forward(bridge), multimodal.benchmark_multimodal_cache(bridge)]
    for result in results:
        assert result.passed, result
        assert result.severity.name == "INFO", result
    assert results[1].details["vision_cache_entries"] > 10
    generated = multimodal.benchmark_multimodal_generation(bridge)
    assert generated.passed == (name not in NOT_GENERATED), generated


def test_a_class_without_an_adapter_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"no adapter here for Linear\. There is one for .*CLIPVisionModel"):
        tl.bridge(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"CLIPModel: it is two towers.*model.vision_model"):
        tl.bridge(tiny.CASES["clip"]().model)
    assert not tl.cannot().keys() & set(tl.architectures())


def test_a_language_tower_with_two_stacks_is_refused() -> None:
    with pytest.raises(ValueError, match="T5ForConditionalGeneration has no one stack"):
        tl.bridge(tiny.CASES["blip_2_t5"]().model)


@torch.no_grad()
@pytest.mark.parametrize("engine", ["hooked", "nnsight"])
@pytest.mark.parametrize("name", ["clip", "llava"])
# TransformerLens' own adapter of LLaVA names hooks that its vision tower does not have.
@pytest.mark.filterwarnings("ignore:Hook alias:UserWarning")
def test_what_was_loaded_is_bridged_and_left_as_it_is(name: str, engine: Any) -> None:
    case = tiny.CASES[name]()
    raw = case.model.vision_model if name == "clip" else case.model
    model = mm.wrap(copy.deepcopy(raw), engine=engine)
    bridged = tl.bridge(model)
    given = case.inputs["pixel_values"] if name == "clip" else torch.tensor([[1, 5, 7, 9]])
    want = raw(given)
    value = want.logits if name == "llava" else want.last_hidden_state
    got = bridged(given)
    torch.testing.assert_close(got if isinstance(got, Tensor) else got[0], value, rtol=1e-4, atol=1e-5)
    inputs = {"pixel_values" if name == "clip" else "input_ids": given}
    plain = model.run(inputs).output
    assert torch.equal(plain.logits if name == "llava" else plain.last_hidden_state, value)
