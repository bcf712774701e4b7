"""A module that is here already, as nnsight's users wrap one; settings of tokenizers; their own envoys."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import beartype  # noqa: F401  Before nnsight, whose `.save` on every object it cannot be imported after.
import nnsight
import pytest
import tiny
import tiny_tokenizers
import torch
from diffusers import UNet2DConditionModel
from nnsight.intervention.envoy import Envoy
from zoo_inputs import INPUTS

import mm_adapters as mm
from mm_adapters import zoo
from mm_adapters.traced import TracedModel

TEXT = "a red circle"


@pytest.mark.parametrize("name", ["clip", "llava", "opt_lm", "stable_diffusion"])
@pytest.mark.parametrize("option", ["dtype", "torch_dtype"])
def test_a_module_is_cast_as_its_own_to_casts_it(name: str, option: str) -> None:
    plain = tiny.CASES[name]().model
    model = TracedModel(plain, **{option: "float64"}, device="cpu", dispatch=True)
    assert model.wrapped is plain
    assert model.dtype == torch.float64
    parts = [plain] if isinstance(plain, torch.nn.Module) else [plain.unet, plain.vae, plain.text_encoder]
    for part in parts:
        tensors = [*part.parameters(), *part.buffers()]
        assert {t.dtype for t in tensors if t.is_floating_point()} == {torch.float64}
        assert {t.device.type for t in tensors} == {"cpu"}


def test_a_module_is_moved_and_auto_leaves_its_dtype() -> None:
    plain = tiny.CASES["opt_lm"]().model.to(torch.bfloat16)
    model = TracedModel(plain, device="meta", dtype="auto")
    assert {p.device.type for p in plain.parameters()} == {"meta"}
    assert model.dtype == torch.bfloat16
    with pytest.raises(mm.InputError, match="There is no device 'nowhere'"):
        TracedModel(tiny.CASES["opt_lm"]().model, device="nowhere")
    with pytest.raises(mm.InputError, match="none a model runs in"):
        TracedModel(tiny.CASES["opt_lm"]().model, dtype="int8")


def test_a_module_that_its_library_placed_stays_there() -> None:
    plain = tiny.CASES["opt_lm"]().model
    plain.hf_device_map = {"": "cpu"}
    with pytest.raises(mm.InputError, match=r"placed or packed by its library.*Leave device"):
        TracedModel(plain, device="cpu")
    assert TracedModel(plain).wrapped is plain


def test_a_module_of_a_checkpoint_takes_the_processor_beside_it(tmp_path: Path) -> None:
    plain = mm.load("tiny-llava").wrapped
    assert plain.name_or_path == str(zoo.path("tiny-llava"))
    model = TracedModel(plain)
    with torch.no_grad(), model.trace(**INPUTS["tiny-llava"]):
        logits = model.output.logits.save()
    assert torch.equal(logits, mm.load("tiny-llava").run(INPUTS["tiny-llava"]).output.logits)
    own = copy.deepcopy(tiny_tokenizers.llama())
    assert TracedModel(plain, tokenizer=own).tokenizer is own
    plain.name_or_path = str(tmp_path / "nowhere")
    with pytest.raises(mm.InputError, match="came without a processor"), TracedModel(plain).trace(TEXT):
        pass


@pytest.mark.parametrize("dispatch", [True, False])
def test_settings_of_a_tokenizer_hold_before_and_after_the_weights_are_read(dispatch: bool) -> None:
    model = TracedModel("tiny-llava", dispatch=dispatch, tokenizer_kwargs={"padding_side": "right"})
    model.tokenizer.truncation_side = "left"  # As a user sets one later.
    texts = [TEXT, "a blue square on a white background"]
    with torch.no_grad(), model.trace(texts):
        mask = nnsight.save(model.inputs[1]["attention_mask"])
    assert model.dispatched
    assert mask[0].tolist() == sorted(mask[0].tolist(), reverse=True)
    assert (model.tokenizer.padding_side, model.tokenizer.truncation_side) == ("right", "left")


def test_settings_that_no_tokenizer_has_are_refused() -> None:
    with pytest.raises(mm.InputError, match=r"padding_sied.*LlamaTokenizer does not have"):
        TracedModel(
            tiny.CASES["llava"]().model,
            tokenizer=copy.deepcopy(tiny_tokenizers.llama()),
            tokenizer_kwargs={"padding_sied": "left"},
        )
    with pytest.raises(mm.InputError, match="came without one"):
        TracedModel(tiny.CASES["llava"]().model, tokenizer_kwargs={"padding_side": "left"})


class Heads(Envoy):
    """An envoy of a user's own."""

    @property
    def squared(self) -> Any:
        return nnsight.util.apply(self.output, torch.square, torch.Tensor)


@pytest.mark.parametrize(
    ("name", "key", "site"),
    [
        ("clip", "mlp", "vision.blocks.0.hook_mlp_out"),
        ("llava", "language_model.layers.*.mlp", "language.blocks.0.hook_mlp_out"),
        ("stable_diffusion", UNet2DConditionModel, "denoiser.blocks.0.attn.hook_z"),
    ],
)
def test_envoys_of_a_users_own_stand_beside_the_sites(name: str, key: Any, site: str) -> None:
    case = tiny.CASES[name]()
    model = TracedModel(case.model, envoys={key: Heads})
    own = next(envoy for envoy in model.modules() if type(envoy) is Heads)
    assert {type(envoy) for envoy in model.modules()} == {TracedModel, Heads, Envoy}
    inputs = case.inputs | ({"num_inference_steps": 1} if name == "stable_diffusion" else {})
    with torch.no_grad(), model.trace(**inputs):
        squared = nnsight.save(own.squared)
    with torch.no_grad(), model.trace(**inputs):
        output = nnsight.save(own.output)
    first, of_first = (v[0] if isinstance(v, tuple) else v for v in (output, squared))
    assert torch.equal(of_first, first**2)
    run = model.run(inputs, read=[site])
    assert torch.equal(run[site], TracedModel(case.model).run(inputs, read=[site])[site])
    for part in (own, next(e for e in model.modules() if type(e) is Envoy)):
        refused = pytest.raises(mm.InputError, match=r"is a part of a model.*whole models")
        with refused, part.trace(torch.zeros(1), remote=True):
            part.output.save()
    assert type(next(e for e in copy.deepcopy(model).modules() if e.path == own.path)) is Heads
