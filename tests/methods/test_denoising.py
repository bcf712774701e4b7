"""Denoising steps: what the sampler predicts is decoded, and ends at the picture itself."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from diffusers import EulerDiscreteScheduler, PNDMScheduler

import mm_adapters as mm
from methods_multimodal.diffusion.denoising import DenoisingSteps, StepReader

INPUTS: dict[str, Any] = {"prompt": "a cat", "seed": 0, "output_type": "pt"}


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
