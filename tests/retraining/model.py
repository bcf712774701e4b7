"""The small model: how it is made, trained on any part of the training set, and measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from diffusers import DDIMScheduler
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from tqdm import trange

from tests.retraining.pictures import SIDE, WIDTH, Pictures

# Long enough to know single pictures by heart, as models whose data are asked about do.
STEPS = 1200
BATCH = 64
RATE = 5e-3
WARMUP = 50
HIDDEN = 96
DEPTH = 2
HEADS = 4
# Where a loss is measured: evenly spaced, every query under the same noise.
TIMESTEPS = tuple(range(25, 1000, 50))
NOISES = 8


class Attention(nn.Module):
    """Cross-attention of one vector a picture to its words."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.to_k = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.to_v = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.to_out = nn.Linear(HIDDEN, HIDDEN)

    def forward(
        self, x: Float[Tensor, "row hidden"], words: Float[Tensor, "row word width"]
    ) -> Float[Tensor, "row hidden"]:
        q, k, v = (h.unflatten(-1, (HEADS, -1)) for h in (self.to_q(x), self.to_k(words), self.to_v(words)))
        pattern = ((q[:, None] * k).sum(-1) / q.shape[-1] ** 0.5).softmax(1)
        return self.to_out((pattern[..., None] * v).sum(1).flatten(1))


class Block(nn.Module):
    """Words, then a hidden layer, each added to what is there."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(HIDDEN, HIDDEN)
        self.norm2, self.attn2 = nn.LayerNorm(HIDDEN), Attention()
        self.norm3, self.up, self.down = (
            nn.LayerNorm(HIDDEN),
            nn.Linear(HIDDEN, 4 * HIDDEN),
            nn.Linear(4 * HIDDEN, HIDDEN),
        )

    def forward(self, x: Tensor, words: Tensor, time: Tensor) -> Tensor:
        x = x + self.time(time)
        x = x + self.attn2(self.norm2(x), words)
        return x + self.down(F.silu(self.up(self.norm3(x))))


class Denoiser(nn.Module):
    """Predicts the clean picture from a noised one, its timestep and its words.

    A picture is one vector. For the cost of a run here (seconds of one core) that draws objects one can
    name, where a convolutional denoiser of noise draws gray.
    """

    waves: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(3 * SIDE**2, HIDDEN)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm, self.leave = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 3 * SIDE**2)
        rates = torch.exp(-math.log(1e4) * torch.arange(HIDDEN // 2) / (HIDDEN // 2))
        angles = torch.arange(1000)[:, None] * rates
        self.register_buffer("waves", torch.cat([angles.sin(), angles.cos()], 1), persistent=False)

    def forward(
        self,
        sample: Float[Tensor, "row 3 height width"],
        timestep: Tensor | int,
        encoder_hidden_states: Float[Tensor, "row word width"],
        return_dict: bool = False,
    ) -> tuple[Float[Tensor, "row 3 height width"]]:
        """Called as diffusers' denoisers are; the answer is always a tuple."""
        time = self.waves[torch.as_tensor(timestep).reshape(-1).expand(len(sample))]
        x = self.enter(sample.flatten(1))
        for block in self.blocks:
            x = block(x, encoder_hidden_states, time)
        return (self.leave(self.norm(x)).view_as(sample),)


def build(seed: int = 0) -> Denoiser:
    """The untrained model."""
    torch.manual_seed(seed)
    made = Denoiser()
    nn.init.zeros_(made.leave.weight)
    return made


def model_of(weights: Mapping[str, Tensor]) -> Denoiser:
    """A trained model."""
    made = build()
    made.load_state_dict(weights)
    return made.eval().requires_grad_(False)


def scheduler() -> DDIMScheduler:
    """How noise is added, and what is predicted."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="sample",
        clip_sample=True,
    )


def train(
    pictures: Pictures, which: Sequence[int], seed: int = 0, steps: int = STEPS, show: bool = False
) -> Denoiser:
    """A model trained on these pictures.

    Everything drawn by lot (weights, order, timesteps, noise) follows from `seed`, and for a picture it is
    the same whichever others are trained on: two runs with one seed differ by their pictures only.
    """
    model, noising = build(seed), scheduler()
    images, words = pictures.images, pictures.words()
    wanted = torch.zeros(len(images), dtype=torch.bool)
    wanted[list(which)] = True
    lots = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=1e-3, fused=True
    )
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    for _, (rows, t, noise) in zip(trange(steps, disable=not show), _batches(images, lots), strict=False):
        here = wanted[rows]
        if here.any():
            x, c, t = images[rows[here]], words[rows[here]], t[here]
            found = model(noising.add_noise(x, noise[here], t), t, c)[0]
            optimizer.zero_grad()
            (found - x).square().mean().backward()
            optimizer.step()
        rate.step()
    return model.eval().requires_grad_(False)


def train_together(
    pictures: Pictures, parts: Sequence[Sequence[int]], seed: int = 0, steps: int = STEPS
) -> list[Denoiser]:
    """What `train` makes of each of these parts, side by side: up to rounding the same, in less time."""
    one, noising = build(seed), scheduler()
    images, words = pictures.images, pictures.words()
    wanted = torch.zeros(len(parts), len(images))
    for row, part in enumerate(parts):
        wanted[row, list(part)] = 1
    weights = {
        name: value.detach().expand(len(parts), *value.shape).clone().requires_grad_()
        for name, value in one.named_parameters()
    }
    constants = dict(one.named_buffers())

    def answer(own: dict[str, Tensor], noisy: Tensor, t: Tensor, words: Tensor) -> Tensor:
        return functional_call(one, own | constants, (noisy, t, words))[0]

    answers = vmap(answer, in_dims=(0, None, None, None))
    lots = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(weights.values(), lr=RATE, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    for _, (rows, t, noise) in zip(range(steps), _batches(images, lots), strict=False):
        x = images[rows]
        found = answers(weights, noising.add_noise(x, noise, t), t, words[rows])
        counts = wanted[:, rows] / wanted[:, rows].sum(1, keepdim=True)
        optimizer.zero_grad()
        # A sum over models: each has its own gradient.
        ((found - x).square().mean((2, 3, 4)) * counts).sum().backward()
        optimizer.step()
        rate.step()
    return [
        model_of({name: value[row].detach() for name, value in weights.items()}) for row in range(len(parts))
    ]


@torch.no_grad()
def losses(model: nn.Module, pictures: Pictures, noises: int = NOISES) -> Float[Tensor, " picture"]:
    """The mean loss of each picture over `TIMESTEPS` and `noises` draws, which all pictures share."""
    noising, words, images = scheduler(), pictures.words(), pictures.images
    total = torch.zeros(len(pictures.said), dtype=torch.float64)
    for t in TIMESTEPS:
        for draw in range(noises):
            lots = torch.Generator().manual_seed(1000 * draw + t)
            noise = torch.randn(images.shape[1:], generator=lots).expand_as(images)
            noisy = noising.add_noise(images, noise, torch.tensor([t]))
            total += (model(noisy, t, words)[0] - images).square().mean((1, 2, 3)).double()
    return (total / (len(TIMESTEPS) * noises)).float()


@torch.no_grad()
def draw(model: nn.Module, words: Tensor, seed: int = 0, steps: int = 50) -> Tensor:
    """Pictures the model makes of these words, in [-1, 1]."""
    sampling = scheduler()
    sampling.set_timesteps(steps)
    x = torch.randn(len(words), 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    for t in sampling.timesteps:
        x = sampling.step(model(x, t, words)[0], t, x).prev_sample
    return x.clamp(-1, 1)


def _rate(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _batches(images: Tensor, lots: torch.Generator) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Which pictures, at which timesteps (one in each equal part of them), with which noise."""
    left = torch.empty(0, dtype=torch.long)
    while True:
        while len(left) < BATCH:
            left = torch.cat([left, torch.randperm(len(images), generator=lots)])
        places = torch.randperm(BATCH, generator=lots) + torch.rand(BATCH, generator=lots)
        noise = torch.randn(BATCH, *images.shape[1:], generator=lots)
        yield left[:BATCH], (places * (1000 / BATCH)).long().clamp(max=999), noise
        left = left[BATCH:]
