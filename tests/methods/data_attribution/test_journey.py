"""Journey-TRAK in one call, against the sampling loop and the formula written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_diffusion
import torch
from diffusers import DDIMScheduler, PNDMScheduler

from methods_multimodal.data_attribution import (
    Journey,
    Projection,
    Trak,
    diffusion_examples,
    diffusion_task,
    featurise,
    journey_trak,
    trajectory,
)
from mm_adapters import InputError, MissingSiteError, StoreError, wrap

STEPS = {"n_steps": 5, "n_own": 3}


def pipeline() -> Any:
    pipe = tiny.stable_diffusion().model
    pipe.scheduler = DDIMScheduler(steps_offset=1)
    return pipe


@torch.no_grad()
def by_hand(pipe: Any, prompt: str, seed: int, scale: float) -> tuple[list[torch.Tensor], list[int]]:
    """What DDIM takes for the clean latent at each of five steps, in a loop of its own."""
    words = torch.cat(pipe.encode_prompt([prompt], "cpu", 1, True)[:2][::-1])
    side = pipe.unet.config.sample_size
    x = torch.randn(
        1, pipe.unet.config.in_channels, side, side, generator=torch.Generator().manual_seed(seed)
    )
    pipe.scheduler.set_timesteps(5)
    found, times = [], [int(t) for t in pipe.scheduler.timesteps]
    for t in times:
        free, guided = pipe.unet(torch.cat([x, x]), t, encoder_hidden_states=words).sample.chunk(2)
        eps = free + scale * (guided - free)
        kept = pipe.scheduler.alphas_cumprod[t]
        found.append((x - (1 - kept).sqrt() * eps) / kept.sqrt())
        x = pipe.scheduler.step(eps, t, x).prev_sample
    return found, times


@pytest.mark.parametrize("engine", ["hooked", "nnsight"])
def test_a_trajectory_is_what_the_sampler_predicts_on_its_way(engine: str) -> None:
    pipe = pipeline()
    pipe.scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    found = trajectory(wrap(pipe, engine=engine), ["a cat", "a dog"], seed=4, guidance_scale=3.0, **STEPS)
    assert found.steps == (1, 2, 4)
    for number, prompt in enumerate(("a cat", "a dog")):
        expected, times = by_hand(pipe, prompt, 4 + number, 3.0)
        assert found.timestep[number].tolist() == [times[s] for s in found.steps]
        expected = torch.cat([expected[s] for s in found.steps])
        torch.testing.assert_close(found.latents[number], expected, rtol=1e-3, atol=1e-3)
    assert found.pictures.shape[:2] == (2, 3)


def test_one_call_is_trak_of_the_loss_at_each_step(tmp_path: Path) -> None:
    pipe = pipeline()
    lens = wrap(pipe)
    examples = diffusion_examples(lens, torch.rand(6, 3, 16, 16), ["a cat"] * 6)
    which, width = "cross_attention_kv", Projection("sparse", 64)
    task = diffusion_task(lens, timesteps=2, parameters=which)
    store = featurise(task, examples, tmp_path / "store", projection=width, progress=False)
    made = trajectory(lens, ["a cat", "a dog"], seed=4, **STEPS)
    found = journey_trak(lens, store, made, parameters=which, seed=4)
    drawn = journey_trak(lens, store, ["a cat", "a dog"], parameters=which, seed=4, inputs=STEPS)
    assert torch.equal(found.by_step, drawn.by_step)
    assert found.by_step.shape == (2, 3, 6)
    torch.testing.assert_close(found.scores(), found.by_step.mean(1))

    rows = store.rows(0, 6, ["loss@0"])["loss@0"].double()
    kernel = rows.T @ rows
    kernel += Trak().damping * kernel.diagonal().mean() * torch.eye(64)
    words = pipe.encode_prompt(["a cat", "a dog"], "cpu", 1, False)[0].detach()
    weights = [pipe.unet.get_parameter(name) for name in task.parameters]
    project = width.on(sum(w.numel() for w in weights), torch.device("cpu"))
    loss = diffusion_task(lens, timesteps=None, parameters=which, seed=4)
    for q in range(2):
        for step in range(3):
            row = loss.rows(
                {
                    "latents": made.latents[q, step][None],
                    "timestep": made.timestep[q, step][None],
                    "index": torch.tensor([q]),
                },
                range(1),
            )
            out = pipe.unet(row["noisy"], row["timestep"], encoder_hidden_states=words[q : q + 1]).sample
            back = torch.autograd.grad((out - row["target"]).square().mean(), weights)
            phi = project(torch.cat([g.flatten() for g in back])[None], 0).double()
            expected = (phi @ torch.linalg.inv(kernel) @ rows.T)[0].float()
            torch.testing.assert_close(
                found.by_step[q, step], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
            )

    found.save(tmp_path / "journey.safetensors")
    assert Journey.load(tmp_path / "journey.safetensors").prompts == ("a cat", "a dog")
    with pytest.raises(StoreError, match="other parameters"):
        journey_trak(lens, store, made, seed=4)


def test_what_cannot_be_watched_is_said() -> None:
    with pytest.raises(MissingSiteError, match="no site 'text'"):
        trajectory(wrap(tiny_diffusion.unconditional().model), ["a cat"])
    with pytest.raises(InputError, match="needs a prompt"):
        trajectory(wrap(pipeline()), [])
    silent = pipeline()
    silent.scheduler = PNDMScheduler(skip_prk_steps=True, steps_offset=1)
    with pytest.raises(InputError, match="does not say"):
        trajectory(wrap(silent), ["a cat"], **STEPS)
