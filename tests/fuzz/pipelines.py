"""Pipelines that calls are made on: each beside a copy that this package never touches."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.probes import Probe
from tests.fuzz.subjects import TEXTS, Given, Subject, wrapped


def _pictures(output: Any) -> Tensor:
    return torch.as_tensor(output.images)


def tiny_sd(engine: str) -> Subject:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    import mm_adapters as mm
    from mm_adapters.zoo import path

    plain = StableDiffusionPipeline.from_pretrained(path("tiny-sd"), dtype=torch.float32)
    model: Any = mm.load("tiny-sd", device="cpu", engine=engine)
    for pipe in (plain, model.wrapped):
        pipe.set_progress_bar_config(disable=True)

    def draw(rng: Random) -> Given:
        n, steps = rng.choice([1, 1, 2]), rng.choice([1, 2, 2])
        prompts = [rng.choice(TEXTS) for _ in range(n)]
        given: dict[str, Any] = {
            "prompt": prompts if n > 1 or rng.random() < 0.5 else prompts[0],
            "num_inference_steps": steps, "seed": rng.randrange(100), "output_type": "pt",
        }  # fmt: skip
        scale = rng.choice([None, None, 1.0, 3.0])
        if scale is not None:
            given["guidance_scale"] = scale
        if rng.random() < 0.2:
            # With one of them alone the pipeline draws its usual size.
            given |= {"height": rng.choice([32, 64]), "width": 64}
        return Given(given, given, n, str(given), steps, 1 if scale == 1.0 else 2)

    down, mid = "unet.down_blocks.1.attentions.0.transformer_blocks.0", "unet.mid_block.attentions.0"
    heads = model.towers["denoiser"].module.get_submodule(down.partition(".")[2]).attn2.heads
    probes = (
        Probe("denoiser.blocks.1.hook_resid_post", down, loop=True),
        Probe("denoiser.blocks.1.cross_attn.hook_z", f"{down}.attn2.to_out.0", "in", heads, loop=True),
        Probe("denoiser.blocks.2.hook_mlp_out", f"{mid}.transformer_blocks.0.ff", loop=True),
        Probe("text.blocks.1.hook_resid_post", "text_encoder.encoder.layers.1"),
    )
    return Subject(
        "tiny-sd", engine, model, plain, probes, draw, _pictures, "diffusion", raw=True,
        smooth={"output_type": "latent"},
    )  # fmt: skip


def _joint(name: str, engine: str, drop: Sequence[str] = (), parts: int = 1) -> Subject:
    def build() -> Any:
        import tiny_diffusion

        return getattr(tiny_diffusion, name)()

    model, case, plain = wrapped(engine, build)
    inputs = {k: v for k, v in case.inputs.items() if k not in drop}

    def draw(rng: Random) -> Given:
        steps = rng.choice([1, 2, 3])
        given = inputs | {"num_inference_steps": steps, "seed": rng.randrange(100)}
        return Given(given, given, 2, str(given), steps, parts)

    probes = (
        Probe("denoiser.blocks.0.hook_resid_post", "transformer.transformer_blocks.0", item=1, loop=True),
        Probe("denoiser.blocks.0.hook_text_resid_post", "transformer.transformer_blocks.0", loop=True),
    )
    return Subject(
        name, engine, model, plain, probes, draw, _pictures, "diffusion", smooth={"output_type": "latent"}
    )


def heun(engine: str) -> Subject:
    """Stable Diffusion under a scheduler of second order: two calls a step, but one in the last."""

    def build() -> Any:
        import tiny
        from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler

        case = tiny.stable_diffusion()
        case.model.scheduler = HeunDiscreteScheduler.from_config(case.model.scheduler.config)
        return case

    model, case, plain = wrapped(engine, build)

    def draw(rng: Random) -> Given:
        steps = rng.choice([2, 3])
        given = case.inputs | {"num_inference_steps": steps, "seed": rng.randrange(100)}
        return Given(given, given, 2, f"Heun, {given}", steps, 2)

    path = model.towers["denoiser"].stacks["blocks"][0]
    probes = (
        Probe("denoiser.blocks.0.hook_resid_post", f"unet.{path}", loop=True, per_step=2),
        Probe("denoiser.blocks.0.hook_mlp_out", f"unet.{path}.ff", loop=True, per_step=2),
    )
    smooth = {"output_type": "latent"}
    return Subject("heun", engine, model, plain, probes, draw, _pictures, "diffusion", smooth=smooth)


def flux(engine: str) -> Subject:
    return _joint("flux", engine, drop=("negative_prompt", "true_cfg_scale"))


def sd3(engine: str) -> Subject:
    return _joint("stable_diffusion_3", engine, parts=2)
