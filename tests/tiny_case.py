"""What a tiny model of a family is, for tests: its inputs, its output, weights that are all at work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A tiny model, what it is called with, and the part of its output an edit must move.

    `off_path` are globs of sites that the model computes and does not use. `smooth` are inputs with
    which a pipeline's output has a derivative (pixels are clamped); None if it has none anyhow.
    """

    model: Any
    inputs: dict[str, Any]
    head: Callable[[Any], Tensor]
    off_path: tuple[str, ...] = ()
    smooth: dict[str, Any] | None = field(default_factory=lambda: {"output_type": "latent"})

    def differentiable(self) -> dict[str, Any] | None:
        """Inputs with which the output has a derivative, or None."""
        if self.smooth is None:
            return None
        return self.inputs | (self.smooth if "output_type" in self.inputs else {})


def shaken(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with noise on every weight, so that no bias is zero and no gain is one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()


def seeded(make: Callable[[], Any]) -> Any:
    """A module built under a fixed seed, then shaken."""
    torch.manual_seed(0)
    return shaken(make())
