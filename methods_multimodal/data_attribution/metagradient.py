"""What a training would have come to with other data, by differentiating through the whole of it.

The other scorers estimate this at the end of training. Here the training is run again from its start, and
the derivative of each query's loss with respect to each example's weight is carried back through every step:
exact for small changes of the weights, at the price of several trainings.

Source: Engstrom et al. 2025, arXiv 2503.13751 (metagradients); Ilyas and Engstrom 2025, arXiv 2504.16430
(MAGIC).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad, vjp, vmap
from torch.utils import _pytree as pytree
from tqdm import tqdm

from mm_adapters import InputError

State = Any
Weights = dict[str, Tensor]
Step = Callable[[State, int, Tensor], State]


@dataclass(frozen=True)
class Training:
    """A training as a pure function of the examples' weights.

    Args:
        start: The state before the first step, any nest of tensors.
        step: From a state, the step's number and the weights [example] to the next state. It must draw
            the same lots each time it is called with a number, and be differentiable.
        n_steps: How many steps there are.
    """

    start: State
    step: Step
    n_steps: int

    def run(self, weights: Float[Tensor, " example"], *, first: int = 0, state: State = None) -> State:
        """The state after the last step."""
        state = self.start if state is None else state
        with torch.no_grad():
            for number in range(first, self.n_steps):
                state = self.step(state, number, weights)
        return state


def metagradients(
    training: Training,
    losses: Callable[[State], Float[Tensor, " query"]],
    n_examples: int,
    *,
    chunk_size: int | None = None,
    progress: bool | None = None,
) -> Float[Tensor, "query example"]:
    """How much each example lowers each query's loss, to first order in the example's weight.

    The training is run once, of whose states about one in sqrt(n_steps) is kept, and once more in pieces from
    the last to the first, each differentiated. All queries are carried back together.

    Args:
        training: What is run; every example has weight 1.
        losses: The queries' losses after a state.
        n_examples: How many weights there are.
        chunk_size: How many queries are carried back at once; all if None.
        progress: A bar: True, False, or None for one on a terminal only.

    Returns: scores, positive where an example helps: the negative derivative of the loss.
    Raises: InputError if a derivative is not finite, which happens in trainings that are not smooth.
    """
    like = pytree.tree_leaves(training.start)[0]
    ones = torch.ones(n_examples, dtype=like.dtype, device=like.device)
    stride = max(1, math.isqrt(training.n_steps))
    starts = list(range(0, training.n_steps, stride))
    kept: list[State] = []
    state = training.start
    bar = tqdm(total=2 * training.n_steps, desc="metagradients", unit="step", disable=_hidden(progress))
    with bar:
        with torch.no_grad():
            for number in range(training.n_steps):
                if number % stride == 0:
                    kept.append(state)
                state = training.step(state, number, ones)
                bar.update()
        back, total = _of_losses(losses, state), None
        for first, begin in zip(reversed(starts), reversed(kept), strict=True):
            states = [begin]
            last = min(first + stride, training.n_steps)
            with torch.no_grad():
                for number in range(first, last - 1):
                    states.append(training.step(states[-1], number, ones))
            for number in range(last - 1, first - 1, -1):
                back, by_weight = _pulled(training.step, states.pop(), number, ones, back, chunk_size)
                total = by_weight if total is None else total + by_weight
                if not bool(torch.isfinite(by_weight).all()):
                    raise InputError(
                        f"metagradients: the derivative at step {number} of {training.n_steps} is not "
                        "finite: this training is not smooth. Shorten it, lower its rate, or raise eps_root."
                    )
                bar.update()
    assert total is not None
    return -total


def _hidden(progress: bool | None) -> bool | None:
    return None if progress is None else not progress


def _of_losses(losses: Callable[[State], Tensor], state: State) -> State:
    """The derivative of each query's loss with respect to the last state, [query, ...] each."""
    made: Any = vjp(losses, state)
    found, pull = made
    (back,) = vmap(pull)(torch.eye(len(found), dtype=found.dtype, device=found.device))
    return back


def _pulled(
    step: Step, state: State, number: int, weights: Tensor, back: State, chunk_size: int | None
) -> tuple[State, Tensor]:
    """What a step makes of the derivatives with respect to its result: those for its state and weights."""
    made: Any = vjp(lambda s, w: step(s, number, w), state, weights)
    return vmap(made[1], chunk_size=chunk_size)(back)


@dataclass(frozen=True)
class AdamW:
    """AdamW as a pure function, in the arithmetic of torch's own.

    A coordinate that never had a gradient is moved by the decay alone, and its derivative is zero there.

    Args:
        betas: How slowly the means of gradients and of their squares forget.
        weight_decay: As torch's, times the rate.
        eps: Added to the root.
        eps_root: Added under the root. 0 is torch's AdamW; more makes a training smoother where gradients
            are tiny.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    eps: float = 1e-8
    eps_root: float = 0.0

    def start(self, weights: Weights) -> State:
        """The state before the first step."""
        return weights, *({name: torch.zeros_like(w) for name, w in weights.items()} for _ in range(2))

    def step(self, state: State, number: int, rate: float, loss: Callable[[Weights], Tensor]) -> State:
        """One step, `number` counted from 0, down the gradient of `loss`."""
        weights, means, squares = state
        gradients = grad(loss)(weights)
        b1, b2 = self.betas
        means = {n: b1 * means[n] + (1 - b1) * g for n, g in gradients.items()}
        squares = {n: b2 * squares[n] + (1 - b2) * g * g for n, g in gradients.items()}
        c1, c2 = 1 - b1 ** (number + 1), 1 - b2 ** (number + 1)
        moved = {
            n: w * (1 - rate * self.weight_decay)
            - rate / c1 * means[n] / (_root(squares[n] + self.eps_root) / math.sqrt(c2) + self.eps)
            for n, w in weights.items()
        }
        return moved, means, squares


def _root(x: Tensor) -> Tensor:
    """The square root, with derivative 0 instead of infinity at 0."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


def weighted_mean(losses: Float[Tensor, " row"], weights: Float[Tensor, " row"]) -> Float[Tensor, ""]:
    """The mean of a batch's losses in which an example of weight 0 does not take part."""
    total = weights.sum()
    return (losses * weights).sum() / torch.where(total > 0, total, 1.0)
