"""Maps trained to say what the model says in the end, several learning rates side by side; it resumes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from methods_multimodal.core.running import State, run_steps

# Adam's, as torch has them.
_BETAS, _EPS = (0.9, 0.999), 1e-8

Maps = Mapping[str, Tensor]


def kl(
    own: Float[Tensor, "entry token"], said: Float[Tensor, "entry map token"]
) -> Float[Tensor, "entry map"]:
    """The Kullback-Leibler divergence of what each map says from what the model says, in nats."""
    target, said = own.log_softmax(-1)[:, None], said.log_softmax(-1)
    return (target.exp() * (target - said)).sum(-1)


def choose(
    tried: Sequence[Maps],
    losses: Callable[[Mapping[str, Any]], Callable[[Maps], Float[Tensor, " map"]]],
    validation: Sequence[Mapping[str, Any]],
    rates: Sequence[float],
) -> tuple[dict[str, Tensor], Float[Tensor, " map"]]:
    """Of each map the one whose loss on validation batches is least among all rates', and its rate."""
    means = torch.stack([torch.stack([losses(b)(m) for b in validation]).mean(0) for m in tried])
    best = means.argmin(0)
    chosen = {n: torch.stack([tried[int(r)][n][i] for i, r in enumerate(best)]) for n in tried[0]}
    return chosen, torch.tensor([rates[int(i)] for i in best])


def train(
    batches: Sequence[Mapping[str, Any]],
    losses: Callable[[Mapping[str, Any]], Callable[[Maps], Float[Tensor, " map"]]],
    start: Maps,
    *,
    rates: Sequence[float],
    n_steps: int,
    file: Path | None,
) -> list[dict[str, Tensor]]:
    """The maps of each learning rate after so many steps of Adam, the rate falling to zero in a line.

    `losses(batch)` runs the model once, and gives the losses of any maps on that batch: each rate's maps see
    the same batches. No loss depends on another map's weights, so their sum trains each by itself.
    """
    state: dict[str, Tensor] = {}
    for r in range(len(rates)):
        for name, value in start.items():
            state[f"{r} {name}"] = value.clone()
            state[f"{r} {name} mean"] = torch.zeros_like(value)
            state[f"{r} {name} square"] = torch.zeros_like(value)
    bar = tqdm(total=n_steps, desc="training a lens", unit="step", disable=None, leave=False)

    def step(state: State, i: int) -> State:
        loss_of = losses(batches[i % len(batches)])
        new = dict(state)
        for r, rate in enumerate(rates):
            maps = {name: state[f"{r} {name}"].detach().requires_grad_() for name in start}
            with torch.enable_grad():
                gradients = torch.autograd.grad(loss_of(maps).sum(), list(maps.values()))
            for (name, value), gradient in zip(maps.items(), gradients, strict=True):
                mean = torch.lerp(gradient, state[f"{r} {name} mean"], _BETAS[0])
                square = torch.lerp(gradient.square(), state[f"{r} {name} square"], _BETAS[1])
                corrected = (square / (1 - _BETAS[1] ** (i + 1))).sqrt() + _EPS
                move = mean / (1 - _BETAS[0] ** (i + 1)) / corrected
                new[f"{r} {name}"] = value.detach() - rate * (1 - i / n_steps) * move
                new[f"{r} {name} mean"], new[f"{r} {name} square"] = mean, square
        bar.update()
        return new

    with bar:
        done = run_steps(n_steps, step, state, file)
    return [{name: done[f"{r} {name}"] for name in start} for r in range(len(rates))]


def by_row(values: Float[Tensor, "entry map"], rows: Tensor) -> Float[Tensor, "row map"]:
    """The mean over each row's entries: what was drawn independently is a row."""
    rows = rows.to(values.device)
    return torch.stack([values[rows == r].mean(0) for r in rows.unique()])
