"""Structural similarity of maps with several channels, at several scales."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Maps = Float[Tensor, "map channel height width"]
# Eleven pixels and three scales of equal weight, as Hintersdorf et al. have them.
WINDOW, SCALES, SIGMA = 11, 3, 1.5


def similarity(one: Maps, two: Maps) -> Float[Tensor, " map"]:
    """Multi-scale SSIM of maps in 0..1; of maps too small for three scales, of as many as fit.

    Source: Wang, Simoncelli and Bovik 2003, equation 7, here with equal weights.
    """
    parts: list[Tensor] = []
    while True:
        light, structure = _ssim(one, two)
        last = len(parts) == SCALES - 1 or min(one.shape[-2:]) // 2 < WINDOW
        parts.append((light * structure if last else structure).clamp(min=0))
        if last:
            break
        one, two = F.avg_pool2d(one, 2), F.avg_pool2d(two, 2)
    return torch.stack(parts).log().mean(0).exp().mean(1)


def _ssim(one: Maps, two: Maps) -> tuple[Float[Tensor, "map channel"], Float[Tensor, "map channel"]]:
    """The light term and the structure term, averaged over the map."""
    size = min(WINDOW, *one.shape[-2:])
    place = torch.arange(size, dtype=one.dtype, device=one.device) - (size - 1) / 2
    bell = (-(place**2) / (2 * SIGMA**2)).exp()
    bell = bell / bell.sum()
    kernel = torch.outer(bell, bell).expand(one.shape[1], 1, size, size)

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(x, kernel, groups=x.shape[1])

    low, small = 0.01**2, 0.03**2
    m1, m2 = blur(one), blur(two)
    v1, v2, both = blur(one * one) - m1 * m1, blur(two * two) - m2 * m2, blur(one * two) - m1 * m2
    light = (2 * m1 * m2 + low) / (m1 * m1 + m2 * m2 + low)
    structure = (2 * both + small) / (v1 + v2 + small)
    return light.mean((-1, -2)), structure.mean((-1, -2))
