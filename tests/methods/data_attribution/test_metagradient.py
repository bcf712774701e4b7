"""Metagradients against what retraining with other weights gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from methods_multimodal.data_attribution import AdamW, Training, metagradients, weighted_mean
from mm_adapters import InputError

N, WIDTH, RATE = 6, 4, 0.05


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lots = torch.Generator().manual_seed(3)
    x, asked = (torch.randn(n, WIDTH, generator=lots, dtype=torch.float64) for n in (N, 3))
    y, answers = (torch.randn(n, generator=lots, dtype=torch.float64) for n in (N, 3))
    return x, y, asked, answers


def start() -> dict[str, Tensor]:
    lots = torch.Generator().manual_seed(4)
    shapes = {"inner": (WIDTH, 5), "outer": (5,), "unused": (2,)}
    return {n: torch.randn(s, generator=lots, dtype=torch.float64) for n, s in shapes.items()}


def answered(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.tanh(x @ weights["inner"]) @ weights["outer"] + 0 * weights["unused"].sum()


def training(n_steps: int, optimiser: AdamW | None = None) -> Training:
    x, y, _, _ = data()
    made = optimiser or AdamW()

    def step(state, number: int, weights: Tensor):
        rows = torch.tensor([number % N, (number + 2) % N, (number + 3) % N])

        def loss(own: dict[str, Tensor]) -> Tensor:
            return weighted_mean((answered(own, x[rows]) - y[rows]).square(), weights[rows])

        return made.step(state, number, RATE, loss)

    return Training(made.start(start()), step, n_steps)


def losses(state) -> Tensor:
    _, _, asked, answers = data()
    return (answered(state[0], asked) - answers).square()


@pytest.mark.parametrize("n_steps", [2, 7, 16, 23])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_scores_are_what_a_little_less_of_an_example_does(n_steps: int, chunk_size: int | None) -> None:
    run = training(n_steps)
    found = metagradients(run, losses, N, chunk_size=chunk_size, progress=False)
    expected = []
    for i in range(N):
        ends = []
        for sign in (-1, 1):
            weights = torch.ones(N, dtype=torch.float64)
            weights[i] += sign * 1e-5
            ends.append(losses(run.run(weights)))
        expected.append((ends[0] - ends[1]) / 2e-5)
    torch.testing.assert_close(found, torch.stack(expected, 1), rtol=1e-5, atol=1e-8)
    assert (found.abs() > 1e-6).any()


def test_a_step_is_torch_s_adamw() -> None:
    x, y, _, _ = data()
    named = {n: w.clone().requires_grad_() for n, w in start().items()}
    options = {"betas": (0.9, 0.99), "weight_decay": 0.1, "eps": 1e-6}
    theirs = torch.optim.AdamW(named.values(), lr=RATE, **options)
    ours = AdamW(**options)
    state = ours.start(start())
    for number in range(12):
        theirs.zero_grad()
        (answered(named, x) - y).square().mean().backward()
        theirs.step()
        state = ours.step(state, number, RATE, lambda own: (answered(own, x) - y).square().mean())
    for name, value in named.items():
        torch.testing.assert_close(state[0][name], value.detach(), rtol=1e-12, atol=1e-14)


def test_an_example_of_weight_zero_is_not_trained_on() -> None:
    each = torch.tensor([1.0, 5.0, 3.0])
    assert float(weighted_mean(each, torch.tensor([1.0, 0.0, 1.0]))) == 2.0
    assert float(weighted_mean(each, torch.zeros(3))) == 0.0


def test_weights_that_no_loss_reaches_have_no_derivative_and_spoil_none() -> None:
    found = metagradients(training(5), losses, N + 1, progress=False)
    assert torch.isfinite(found).all()
    assert (found[:, N] == 0).all()


def test_a_training_that_is_not_smooth_is_refused() -> None:
    def step(state: Tensor, number: int, weights: Tensor) -> Tensor:
        return state * (1 + (weights.sum() - 2).sqrt())  # Infinitely steep where all weights are 1.

    run = Training(torch.ones(1), step, 3)
    with pytest.raises(InputError, match="step 2 of 3 is not finite"):
        metagradients(run, lambda state: state, 2, progress=False)
