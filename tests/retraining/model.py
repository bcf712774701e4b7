"""The small model: how it is made, trained on any part of the training set, and measured."""

# diffusers annotates its constructors more narrowly than they accept.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportPrivateImportUsage=false

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pixel_shuffle
from tqdm import trange

from tests.retraining.pictures import SIDE, WIDTH, Pictures, folded

STEPS = 1000
BATCH = 16
RATE = 3e-3
WARMUP = 20
# Where a loss is measured: evenly spaced, every query under the same noise.
TIMESTEPS = tuple(range(25, 1000, 50))
NOISES = 4


def build(seed: int = 0) -> UNet2DConditionModel:
    """The untrained model: places of 2 x 2 pixels, cross-attention at 4 x 4 of them."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=SIDE // 2,
        in_channels=12,
        out_channels=12,
        layers_per_block=1,
        block_out_channels=(24, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        # diffusers reads this as the number of heads.
        attention_head_dim=4,
        norm_num_groups=8,
    )


def scheduler() -> DDIMScheduler:
    """How noise is added."""
    return DDIMScheduler(num_train_timesteps=1000, clip_sample=True)


def train(
    pictures: Pictures, which: Sequence[int], seed: int = 0, show: bool = False
) -> UNet2DConditionModel:
    """A model trained on these pictures.

    Everything drawn by lot (weights, order, timesteps, noise) follows from `seed`.
    """
    model, noising = build(seed), scheduler()
    images, words = folded(pictures.images[list(which)]), pictures.words()[list(which)]
    lots = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=1e-4, foreach=True)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, _rate)
    for _, rows in zip(trange(STEPS, disable=not show), _batches(len(which), lots), strict=False):
        x, c = images[rows], words[rows]
        t = torch.randint(0, 1000, (len(rows),), generator=lots)
        noise = torch.randn(x.shape, generator=lots)
        found = model(noising.add_noise(x, noise, t), t, encoder_hidden_states=c).sample
        loss = (found - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return model.eval().requires_grad_(False)


@torch.no_grad()
def losses(
    model: UNet2DConditionModel, pictures: Pictures, noises: int = NOISES
) -> Float[Tensor, " picture"]:
    """The mean loss of each picture over `TIMESTEPS` and `noises` draws, which all pictures share."""
    noising, words, images = scheduler(), pictures.words(), folded(pictures.images)
    total = torch.zeros(len(pictures.said), dtype=torch.float64)
    for t in TIMESTEPS:
        for draw in range(noises):
            lots = torch.Generator().manual_seed(1000 * draw + t)
            noise = torch.randn(images.shape[1:], generator=lots).expand_as(images)
            noisy = noising.add_noise(images, noise, torch.tensor([t]))
            found = torch.cat(
                [
                    model(a, t, encoder_hidden_states=b).sample
                    for a, b in zip(noisy.split(64), words.split(64), strict=True)
                ]
            )
            total += (found - noise).square().mean((1, 2, 3)).double()
    return (total / (len(TIMESTEPS) * noises)).float()


@torch.no_grad()
def draw(model: UNet2DConditionModel, words: Tensor, seed: int = 0, steps: int = 50) -> Tensor:
    """Pictures the model makes of these words, in [-1, 1]."""
    sampling = scheduler()
    sampling.set_timesteps(steps)
    x = torch.randn(len(words), 12, SIDE // 2, SIDE // 2, generator=torch.Generator().manual_seed(seed))
    for t in sampling.timesteps:
        x = sampling.step(model(x, t, encoder_hidden_states=words).sample, t, x).prev_sample
    return pixel_shuffle(x, 2).clamp(-1, 1)


def _rate(step: int) -> float:
    return min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / STEPS))


def _batches(n: int, lots: torch.Generator) -> Iterator[Tensor]:
    left = torch.empty(0, dtype=torch.long)
    while True:
        while len(left) < BATCH:
            left = torch.cat([left, torch.randperm(n, generator=lots)])
        yield left[:BATCH]
        left = left[BATCH:]
