"""Tiny models to attribute to."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor

from methods_multimodal.data_attribution import Task, denoiser_task


def pixel_unet(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()


def denoiser(seed: int = 0, **more: object) -> Task:
    return denoiser_task(pixel_unet(seed), DDPMScheduler(), timesteps=[5, 300], **more)  # type: ignore[arg-type]


def pictures(n: int) -> dict[str, Tensor]:
    return {"latents": torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))}
