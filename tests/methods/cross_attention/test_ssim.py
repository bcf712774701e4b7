"""Multi-scale SSIM beside torchmetrics, which has it for maps above 40 pixels at three scales."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

from methods_multimodal.cross_attention._ssim import SCALES, SIGMA, WINDOW, similarity

ALIKE = {"sigma": SIGMA, "kernel_size": WINDOW, "data_range": 1.0, "reduction": "none"}
# Ours has three scales where the third still holds a window, from 44 pixels on; below it has fewer.
SIZES = [(23, 30), (43, 43), (44, 61), (64, 64), (97, 128)]


def n_scales(size: tuple[int, int]) -> int:
    return min(SCALES, 1 + sum(min(size) // 2**k >= WINDOW for k in (1, 2)))


def pairs(size: tuple[int, int], noise: float, channels: int = 3) -> tuple[Tensor, Tensor]:
    """Smooth maps in 0..1, as guided noise looks, and the same with noise on them."""
    generator = torch.Generator().manual_seed(0)
    maps = F.avg_pool2d(torch.rand(4, channels, *size, generator=generator), 5, 1, 2)
    maps = (maps - maps.min()) / (maps.max() - maps.min())
    other = maps + noise * F.avg_pool2d(torch.randn(maps.shape, generator=generator), 3, 1, 1)
    return maps, other.clamp(0, 1)


def by_channel(maps: Tensor) -> Tensor:
    """Every channel as a map of its own: torchmetrics would average them at every scale."""
    return maps.flatten(0, 1).unsqueeze(1)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_maps_that_are_alike_score_as_torchmetrics_says(size: tuple[int, int]) -> None:
    one, two = pairs(size, 0.02)
    n = n_scales(size)
    each = multiscale_structural_similarity_index_measure(
        by_channel(one), by_channel(two), betas=(1 / n,) * n, normalize="relu", **ALIKE
    )
    found = similarity(one, two)
    assert float(found.max()) < 0.9995
    torch.testing.assert_close(found, each.unflatten(0, (4, 3)).mean(1), rtol=0, atol=1e-3)


@pytest.mark.parametrize("noise", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_any_maps_score_as_torchmetrics_terms_without_the_border_it_makes_up(
    size: tuple[int, int], noise: float
) -> None:
    """At the coarsest scale torchmetrics also averages windows that reach over the edge, mirrored there."""
    one, two = pairs(size, noise)
    a, b, terms = by_channel(one), by_channel(two), []
    for _ in range(n_scales(size) - 1):
        terms.append(structural_similarity_index_measure(a, b, return_contrast_sensitivity=True, **ALIKE)[1])
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    _, full = structural_similarity_index_measure(a, b, return_full_image=True, **ALIKE)
    edge = WINDOW // 2
    terms.append(full[..., edge:-edge, edge:-edge].mean((1, 2, 3)))
    each = torch.stack(terms).clamp(min=0).prod(0) ** (1 / len(terms))
    torch.testing.assert_close(similarity(one, two), each.unflatten(0, (4, 3)).mean(1), rtol=0, atol=1e-3)


def test_torchmetrics_refuses_maps_of_forty_pixels_and_ours_does_not() -> None:
    one, two = pairs((40, 40), 0.1)
    with pytest.raises(ValueError, match="larger than 40"):
        multiscale_structural_similarity_index_measure(one, two, betas=(1 / 3,) * 3, **ALIKE)
    assert ((similarity(one, two) > 0.5) & (similarity(one, two) < 1)).all()
