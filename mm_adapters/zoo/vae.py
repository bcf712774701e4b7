"""The autoencoder of tiny-sd: a 64 x 64 image becomes 16 x 16 x 4 numbers and comes back sharp."""

# The libraries annotate these constructors and calls more narrowly than they accept.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from mm_adapters.zoo import world
from mm_adapters.zoo._training import Schedule, device, fit, mixed, seeded, training_folder

SCHEDULE = Schedule(steps=1300, peak_rate=2e-3, warmup=50, weight_decay=0.0, average=0.99)
BATCH = 24
KL_WEIGHT = 1e-6
# Objects are a small part of the picture, and nearly all of what it says.
OBJECT_WEIGHT = 8.0


def build(seed: int = 0) -> AutoencoderKL:
    """A small untrained autoencoder that shrinks each side by 4."""
    torch.manual_seed(seed)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


def pixels(images: list[world.Scene]) -> Tensor:
    """The scenes' images as the autoencoder takes them, [image, 3, 64, 64] in [-1, 1]."""
    batch = torch.from_numpy(world.render_batch(images))
    return (batch.permute(0, 3, 1, 2).float() / 127.5 - 1).to(device())


def scenes_of(step: int, seed: int, batch: int = BATCH) -> list[world.Scene]:
    """What is seen at a step."""
    return [world.scene(step * batch + i, "train", seed + 1, solid=i % 4 != 0) for i in range(batch)]


def loss(model: AutoencoderKL, step: int, seed: int, batch: int = BATCH) -> Tensor:
    """How far the images of this step come back wrong, and how far the latents are from normal."""
    scenes = scenes_of(step, seed, batch)
    images = pixels(scenes)
    with mixed():
        posterior = model.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=seeded(seed, step)).to(images.device)
        back = model.decode(posterior.mean + posterior.std * noise).sample.float()
    ground = images.new_tensor([scene.background_rgb for scene in scenes])[:, :, None, None] / 127.5 - 1
    on_object = ((images - ground).abs().amax(1, keepdim=True) > 0.02).float()
    weight = 1 + OBJECT_WEIGHT * nn.functional.max_pool2d(on_object, 3, 1, 1)
    off = back - images
    error = (weight / weight.mean() * (off.abs() + off.square())).mean()
    return error + KL_WEIGHT * posterior.kl().float().mean()


@torch.no_grad()
def latents(model: AutoencoderKL, scenes: list[world.Scene], batch: int = 64) -> Tensor:
    """The scenes' latents before scaling, [scene, 4, 16, 16]."""
    parts = [scenes[i : i + batch] for i in range(0, len(scenes), batch)]
    return torch.cat([model.encode(pixels(part)).latent_dist.mean.cpu() for part in parts])


def train(work: Path, *, steps: int | None = None, seed: int = 0, resume: bool = False) -> AutoencoderKL:
    """A trained autoencoder whose `scaling_factor` makes the latents of unit size."""
    schedule = SCHEDULE if steps is None else replace(SCHEDULE, steps=steps)
    model = build(seed)
    shown = world.render_batch(scenes_of(0, seed))
    recipe, stages = sys.modules[__name__], {"vae": schedule}
    with training_folder(
        work / "vae", recipe, stages, seed, data=[shown], begins_with={"model": model}
    ) as folder:
        model.to(device())
        fit(
            model,
            lambda step: loss(model, step, seed),
            schedule,
            folder / "vae.safetensors",
            resume=resume,
            seed=seed,
        )
    sample = latents(model, [world.scene(i, "validation", seed) for i in range(256)])
    model.register_to_config(scaling_factor=float(1 / sample.std()))
    return model
