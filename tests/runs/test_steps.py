"""A step is what the scheduler and the pipeline say, and each call of a denoiser is told apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers as df
import pytest
import tiny
import torch
from torch import Tensor

import mm_adapters as mm
from methods_multimodal.diffusion.denoising import step_reader
from mm_adapters import Call
from tests.runs.watched import ENGINES, calls_of

OUT = "denoiser.hook_out"
FOUR = {"num_inference_steps": 4}
# The calls of four steps, by each scheduler's own rule.
TWICE = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]
SCHEDULERS: dict[str, tuple[Callable[[], Any], list[tuple[int, int]]]] = {
    "ddim": (lambda: df.DDIMScheduler(), [(i, 0) for i in range(4)]),
    "heun": (lambda: df.HeunDiscreteScheduler(), TWICE),
    "kdpm2": (lambda: df.KDPM2DiscreteScheduler(), TWICE),
    "kdpm2_ancestral": (lambda: df.KDPM2AncestralDiscreteScheduler(), TWICE),
    "pndm": (lambda: df.PNDMScheduler(), [(i, j) for i in range(3) for j in range(4)] + [(3, 0)]),
    "plms": (lambda: df.PNDMScheduler(skip_prk_steps=True), [(0, 0), (0, 1), (1, 0), (2, 0), (3, 0)]),
    "unipc": (lambda: df.UniPCMultistepScheduler(), [(i, 0) for i in range(4)]),
}


def stable_diffusion(scheduler: str) -> tiny.Case:
    case = tiny.CASES["stable_diffusion"]()
    case.model.scheduler = SCHEDULERS[scheduler][0]()
    return case


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")  # diffusers' KDPM2.
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_call_is_read_and_says_its_step(scheduler: str, engine: Any) -> None:
    case = stable_diffusion(scheduler)
    inputs = case.inputs | FOUR
    right = torch.stack(calls_of(case.model.unet, case, inputs))
    model = mm.wrap(case.model, engine=engine)
    run = model.run(inputs, read=[mm.Read(OUT, steps=range(4))])
    torch.testing.assert_close(run[OUT], right, rtol=0, atol=0)
    assert list(run.calls[OUT]) == [Call(*c) for c in SCHEDULERS[scheduler][1]]
    first = model.run(inputs, read=[mm.Read(OUT, calls=[0])])
    torch.testing.assert_close(
        first[OUT], right[[c == 0 for _, c in SCHEDULERS[scheduler][1]]], rtol=0, atol=0
    )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("scheduler", ["heun", "plms"])
def test_an_edit_of_one_step_is_made_in_all_its_calls_and_no_other(scheduler: str, engine: Any) -> None:
    case = stable_diffusion(scheduler)
    inputs = case.inputs | FOUR
    model = mm.wrap(case.model, engine=engine)
    plain = model.run(inputs, read=[OUT])
    edited = model.run(
        inputs, read=[OUT], edit=[mm.Edit("denoiser.hook_mid_block", torch.zeros_like, steps=[2])]
    )
    moved = [bool((a != b).any()) for a, b in zip(plain[OUT], edited[OUT], strict=True)]
    steps = [step for step, _ in SCHEDULERS[scheduler][1]]
    assert moved == [step >= 2 for step in steps]
    assert edited.receipts[0].fired == steps.count(2)


def test_a_run_from_a_picture_counts_the_steps_that_it_takes() -> None:
    parts = tiny.CASES["stable_diffusion"]().model.components
    pipe = df.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = df.HeunDiscreteScheduler()
    inputs = {"prompt": "a cat", "image": torch.rand(1, 3, 16, 16), "strength": 0.5, "seed": 0} | FOUR
    run = mm.wrap(pipe).run(inputs | {"output_type": "pt"}, read=[OUT])
    assert list(run.calls[OUT]) == [Call(0, 0), Call(0, 1), Call(1, 0)]
    with pytest.raises(mm.ReadNeverFiredError, match="no step 3, for this run took 2 steps"):
        mm.wrap(pipe).run(inputs, read=[mm.Read(OUT, steps=[3])])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_prompt_changed_in_a_callback_shifts_no_step(engine: Any) -> None:
    case = tiny.CASES["flux"]()
    other = case.model.encode_prompt(prompt=["a dog", "a cat"], prompt_2=None, max_sequence_length=6)[0]
    plain = {k: v for k, v in case.inputs.items() if k not in ("negative_prompt", "true_cfg_scale")}
    inputs = plain | FOUR | {
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
        "callback_on_step_end": lambda pipe, step, time, tensors: {"prompt_embeds": other},
    }  # fmt: skip
    right = torch.stack(calls_of(case.model.transformer, case, inputs))
    model = mm.wrap(case.model, engine=engine)
    run = model.run(inputs, read=[OUT])
    torch.testing.assert_close(run[OUT], right, rtol=0, atol=0)
    last = model.run(inputs, read=[mm.Read(OUT, steps=[3])])
    torch.testing.assert_close(last[OUT], right[3:], rtol=0, atol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_guidance_by_two_calls_is_one_call_of_both_rows(engine: Any) -> None:
    case = tiny.CASES["flux"]()
    right = calls_of(case.model.transformer, case)
    run = mm.wrap(case.model, engine=engine).run(case.inputs, read=[OUT])
    torch.testing.assert_close(run[OUT], torch.stack([torch.cat(right[:2]), torch.cat(right[2:])]))
    assert list(run.calls[OUT]) == [Call(0, 0), Call(1, 0)]
    assert run.rows["denoiser"] == {"cond": slice(0, 2), "uncond": slice(2, 4)}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_guider_that_calls_once_more_is_a_call_of_its_own(engine: Any) -> None:
    case = tiny.CASES["stable_diffusion_3"]()
    skipped = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.2, "skip_layer_guidance_stop": 0.9}
    inputs = case.inputs | FOUR | skipped
    right = calls_of(case.model.transformer, case, inputs)
    sizes = [len(call) for call in right]
    assert sizes == [4, 4, 2, 4, 2, 4, 2], "the guider no longer calls as this test expects"
    model = mm.wrap(case.model, engine=engine)
    first = model.run(inputs, read=[mm.Read(OUT, calls=[0])])
    torch.testing.assert_close(first[OUT], torch.stack([c for c in right if len(c) == 4]), rtol=0, atol=0)
    cond = model.run(inputs, read=[mm.Read(OUT, rows="cond")])
    torch.testing.assert_close(cond[OUT], torch.stack([c[2:] for c in right if len(c) == 4]), rtol=0, atol=0)
    added = model.run(inputs, read=[mm.Read(OUT, calls=[1])])
    torch.testing.assert_close(added[OUT], torch.stack([c for c in right if len(c) == 2]), rtol=0, atol=0)
    assert [call.step for call in added.calls[OUT]] == [1, 2, 3]
    with pytest.raises(mm.InputError, match="calls="):
        model.run(inputs, read=[OUT])


def perturbed() -> tiny.Case:
    parts = tiny.CASES["stable_diffusion"]().model.components
    pipe = df.StableDiffusionPAGPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    inputs = {"prompt": ["a cat", "a dog"], "num_inference_steps": 2, "seed": 0, "output_type": "pt"}
    return tiny.Case(pipe, inputs | {"pag_scale": 3.0}, lambda o: o.images)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("scales", "parts"),
    [
        ({}, ("uncond", "cond", "perturbed")),
        ({"pag_scale": 0.0}, ("uncond", "cond")),
        ({"guidance_scale": 1.0}, ("cond", "perturbed")),
    ],
)
def test_perturbed_attention_is_a_part_of_the_batch(scales: Any, parts: tuple[str, ...], engine: Any) -> None:
    case = perturbed()
    inputs = case.inputs | scales
    right = calls_of(case.model.unet, case, inputs)
    model = mm.wrap(case.model, engine=engine)
    for i, part in enumerate(parts):
        value = model.run(inputs, read=[mm.Read(OUT, rows=part)])[OUT]  # type: ignore[arg-type]
        torch.testing.assert_close(
            value, torch.stack([c.chunk(len(parts))[i] for c in right]), rtol=0, atol=0
        )
    assert tuple(model.run(inputs, read=[OUT]).rows["denoiser"]) == parts


def test_where_the_perturbed_layer_attends_parts_are_not_apart_and_it_says_so() -> None:
    case = perturbed()
    model = mm.wrap(case.model)
    site = (
        "denoiser.blocks.1.attn.hook_q"  # In the middle block, where the perturbed part attends to nothing.
    )
    whole = model.run(case.inputs, read=[site])[site]
    assert whole.shape[1] == 4
    with pytest.raises(mm.InputError, match="not apart"):
        model.run(case.inputs, read=[mm.Read(site, rows="cond")])
    value = model.run(case.inputs, read=["denoiser.blocks.1.attn.hook_v"])["denoiser.blocks.1.attn.hook_v"]
    assert value.shape[1] == 6


def test_frames_of_a_second_order_sampler_are_those_of_the_steps_first_calls() -> None:
    case = stable_diffusion("heun")
    model, reader = mm.wrap(case.model), step_reader(mm.wrap(case.model), 4, 3)
    inputs = reader.inputs(case.inputs)
    calls = calls_of(case.model.unet, case, inputs)
    record = reader.step_predictions(model, model.run(inputs, read=reader.reads()))
    assert record.steps == (1, 2, 3)
    right = torch.stack([calls[i].chunk(2)[1] for i in (2, 4, 6)])
    torch.testing.assert_close(record.parts["cond"], right, rtol=0, atol=0)
    assert record.times == tuple(float(case.model.scheduler.timesteps[i]) for i in (2, 4, 6))


def test_an_edit_is_told_its_call() -> None:
    case = stable_diffusion("heun")
    told: list[Call] = []

    def noted(value: Tensor, call: Call) -> Tensor:
        told.append(call)
        return value

    mm.wrap(case.model).run(case.inputs | FOUR, edit=[mm.Edit("denoiser.hook_mid_block", noted)])
    assert told == [Call(*c) for c in TWICE]


def test_the_scheduler_is_left_as_it_was_when_a_run_breaks_off() -> None:
    case = stable_diffusion("ddim")
    model = mm.wrap(case.model)

    def broken(value: Tensor) -> Tensor:
        raise RuntimeError("broken off")

    with pytest.raises(RuntimeError, match="broken off"):
        model.run(case.inputs, edit=[mm.Edit("denoiser.hook_mid_block", broken)])
    assert "step" not in vars(case.model.scheduler)
