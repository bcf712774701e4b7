"""Denoising steps: what the sampler is given and predicts, by every family's own guidance."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import tiny_diffusion
import torch
from diffusers import EulerDiscreteScheduler, PNDMScheduler
from torch import Tensor

import mm_adapters as mm
from methods_multimodal.diffusion import DenoisingSteps, StepReader, pictures_of, step_reader

INPUTS: dict[str, Any] = {"prompt": "a cat", "seed": 0, "output_type": "pt"}
BUILDERS = {
    **tiny_diffusion.CASES,
    **{
        f.__name__: f
        for f in (
            tiny.stable_diffusion,
            tiny.stable_diffusion_xl,
            tiny_diffusion.image_to_image,
            tiny_diffusion.inpainting,
            tiny_diffusion.controlled,
            tiny_diffusion.consistency,
            tiny_diffusion.flux_control,
        )
    },
}
NO_LOOP = {"t5_encoder", "sd3_transformer", "flux_transformer", "sana_transformer", "unet2d", "mclip"}
UNGUIDED = {"unconditional", "consistency", "flux_control"}
PIPELINES = sorted(BUILDERS.keys() - NO_LOOP)


def watch(pipeline: Any, n_steps: int) -> tuple[torch.Tensor, DenoisingSteps]:
    model = mm.HookedModel(pipeline)
    reader = StepReader(n_steps)
    run = model.run(reader.inputs(INPUTS), read=reader.reads())
    return run.output.images, reader.pictures(model, run)


# diffusers makes an array of a tensor in a way numpy 2 warns of.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("scheduler", [None, EulerDiscreteScheduler])
def test_the_last_prediction_is_the_picture(scheduler: Any) -> None:
    pipeline = tiny.stable_diffusion().model
    if scheduler is not None:
        pipeline.scheduler = scheduler(steps_offset=1)
    images, found = watch(pipeline, 5)
    assert found.shows == "prediction"
    assert found.steps == (1, 2, 3, 4)
    torch.testing.assert_close(found.pictures[-1:], images, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(found.pictures[0], found.pictures[-1], atol=1e-3)


def test_a_sampler_that_does_not_say_what_it_predicts_shows_its_latents() -> None:
    pipeline = tiny.stable_diffusion().model
    pipeline.scheduler = PNDMScheduler(skip_prk_steps=True, steps_offset=1)
    _, found = watch(pipeline, 4)
    assert found.shows == "latent"
    assert len(found.pictures) == len(found.steps)


def test_one_step_has_a_picture_and_no_frames() -> None:
    images, found = watch(tiny.stable_diffusion().model, 1)
    assert found.steps == ()
    assert len(found.pictures) == 0
    assert images.shape[0] == 1


def catch(sampler: Any) -> list[tuple[Tensor, float, Tensor, Tensor]]:
    """What a sampler's every step is given (prediction, time, latents), and makes of it."""
    calls: list[tuple[Tensor, float, Tensor, Tensor]] = []
    step = sampler.step

    def wrapped(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = step(model_output, timestep, sample, *args, **kwargs)
        calls.append((model_output, float(timestep), sample, result[0]))
        return result

    sampler.step = wrapped
    return calls


def loop_inputs(case: tiny.Case, n_steps: int, **more: Any) -> tuple[mm.HookedModel, Any, StepReader, list]:
    model = mm.HookedModel(case.model)
    reader = step_reader(model, n_steps)
    sampler = getattr(case.model, reader.sampling.scheduler)
    calls = catch(sampler)
    run = model.run(reader.inputs(case.inputs | more), read=reader.reads())
    del sampler.step  # The class's own again.
    return model, run, reader, calls


@pytest.mark.parametrize("name", PIPELINES)
def test_the_guided_prediction_is_what_the_sampler_was_given(name: str) -> None:
    model, run, reader, calls = loop_inputs(BUILDERS[name](), 4)
    record = reader.step_predictions(model, run)
    assert record.steps == (1, 2, 3)
    for i, step in enumerate(record.steps):
        prediction, time, latents, _ = calls[step]
        n_rows = len(record.guided[i])  # DiT's sampler has the rows of both parts, and they are the same.
        torch.testing.assert_close(record.guided[i], prediction[:n_rows], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(record.latents[i], latents[:n_rows], rtol=1e-4, atol=1e-4)
        assert record.times[i] == pytest.approx(time)
    parts = {"cond"} if name in UNGUIDED else {"cond", "uncond"}
    assert set(record.parts) == (parts | {"image"} if name == "instruct_pix2pix" else parts)
    assert all(part.shape == record.latents.shape for part in record.parts.values())
    if "uncond" in parts:
        assert not torch.allclose(record.parts["cond"], record.parts["uncond"], atol=1e-5)


@pytest.mark.parametrize("name", PIPELINES)
def test_the_clean_latents_of_the_last_step_are_what_the_loop_ends_with(name: str) -> None:
    model, run, reader, calls = loop_inputs(BUILDERS[name](), 4)
    clean, times = reader.predictions(model, run)
    assert len(clean) == len(times) == 3
    end = calls[-1][3]
    assert clean[-1].shape == end[: len(clean[-1])].shape
    torch.testing.assert_close(clean[-1], end[: len(clean[-1])], rtol=2e-2, atol=2e-2)


# What has no picture, or whose picture is made larger by other loops or cut to another size.
OTHER_PICTURES = {"kandinsky_prior", "unclip"}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", sorted(set(PIPELINES) - OTHER_PICTURES))
def test_the_last_picture_is_the_pipelines_own(name: str) -> None:
    case = BUILDERS[name]()
    # A prediction of what little noise is left at the end, and the sampler's last step.
    model, run, reader, _ = loop_inputs(case, 4)
    frames = reader.pictures(model, run)
    assert frames.shows == "prediction"
    own = case.head(run.output) if name == "unconditional" else pictures_of(model, run.output)
    own = own.permute(0, 3, 1, 2) if own.shape[-1] == 3 else own
    n = len(own)
    assert frames.pictures.shape == (3 * n, *own.shape[1:])
    torch.testing.assert_close(frames.pictures[-n:], own.float(), rtol=0, atol=2e-2)
    assert not torch.allclose(frames.pictures[:n], frames.pictures[-n:], atol=1e-4)


def test_what_makes_no_picture_is_said() -> None:
    model, run, reader, _ = loop_inputs(tiny_diffusion.kandinsky_prior(), 3)
    with pytest.raises(mm.MissingSiteError, match="makes embeddings"):
        reader.pictures(model, run)
    with pytest.raises(mm.InputError, match="no sampling loop of 'prior'"):
        step_reader(model, 3, tower="prior")
    enlarged = mm.HookedModel(tiny_diffusion.unclip().model)
    with pytest.raises(mm.InputError, match="does not say what the loop of 'enlarger'"):
        step_reader(enlarged, 3, tower="enlarger")


def test_a_prior_that_runs_first_is_read_too() -> None:
    case = tiny_diffusion.unclip()
    model = mm.HookedModel(case.model)
    reader = step_reader(model, 4, tower="prior")
    calls = catch(case.model.prior_scheduler)
    run = model.run(reader.inputs(case.inputs), read=reader.reads())
    record = reader.step_predictions(model, run)
    for i, step in enumerate(record.steps):
        torch.testing.assert_close(record.guided[i], calls[step][0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(record.latents[i], calls[step][2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 1.0},
        {"guidance_scale": 4.5},
        {"guidance_scale": 4.5, "guidance_rescale": 0.7},
        {"num_images_per_prompt": 2, "guidance_scale": 2.0},
    ],
)
def test_scales_and_rows_are_those_of_the_run(options: dict[str, Any]) -> None:
    model, run, reader, calls = loop_inputs(tiny.stable_diffusion(), 3, **options)
    record = reader.step_predictions(model, run)
    for i, step in enumerate(record.steps):
        torch.testing.assert_close(record.guided[i], calls[step][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["stable_diffusion", "flux", "instruct_pix2pix", "unclip", "kandinsky_combined"]
)
def test_both_engines_predict_the_same(name: str) -> None:
    records, case = [], BUILDERS[name]()
    for engine in ("hooked", "nnsight"):
        model = mm.wrap(case.model, engine=engine)
        reader = step_reader(model, 3)
        run = model.run(reader.inputs(case.inputs), read=reader.reads())
        records.append((reader.step_predictions(model, run), reader.pictures(model, run)))
    (ours, frames), (theirs, others) = records
    assert torch.equal(ours.guided, theirs.guided)
    assert torch.equal(frames.pictures, others.pictures)


def test_steps_with_rows_of_their_own_are_an_error() -> None:
    more = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.1, "skip_layer_guidance_stop": 0.9}
    with pytest.raises(mm.InputError, match="guidance adds or drops rows"):
        loop_inputs(tiny_diffusion.stable_diffusion_3(), 5, **more, prompt="a cat", seed=0)
