"""What a head adds, in coordinates: their basis gives it back, however many heads pool the tower."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

import mm_adapters as mm
from methods_multimodal.text_explanations.name_heads import head_basis, head_coordinates
from methods_multimodal.text_explanations.pooled_run import PooledRun
from methods_multimodal.text_explanations.segmentation import above, best_threshold, segmentation_scores
from methods_multimodal.text_explanations.tower_parts import TowerParts

LAYERS, HEADS, D_HEAD, D_MODEL, IMAGES = 3, 2, 4, 8, 5


def parts_of(n_pool: int, width: int) -> TowerParts:
    lots = torch.Generator().manual_seed(n_pool)
    view: Any = mm.SiteMap(tiny.siglip_vision().model).tower("vision")
    readers = torch.randn(n_pool, D_MODEL, width, generator=lots)
    out = torch.randn(LAYERS, HEADS, D_HEAD, D_MODEL, generator=lots)
    return TowerParts(view, out, torch.zeros(LAYERS, D_MODEL), readers, torch.zeros(width), readers)


# One position; many heads that pool into a narrow embedding, and into a wide one.
@pytest.mark.parametrize(("n_pool", "width"), [(1, 6), (1, 3), (5, 6), (5, 40)])
def test_coordinates_give_back_what_each_head_adds_to_each_image(n_pool: int, width: int) -> None:
    parts = parts_of(n_pool, width)
    lots = torch.Generator().manual_seed(9)
    z = torch.randn(IMAGES, LAYERS, n_pool, HEADS, D_HEAD, generator=lots)
    none = torch.zeros(IMAGES, 1)
    embedding = torch.randn(IMAGES, width, generator=lots)
    run = PooledRun(
        embed=torch.zeros(IMAGES, n_pool, D_MODEL),
        mlps=torch.zeros(IMAGES, LAYERS, n_pool, D_MODEL),
        z=z,
        patterns=None,
        values=None,
        mass=none.expand(IMAGES, n_pool),
        mean=none.expand(IMAGES, n_pool),
        pool_mlp=None,
        embedding=embedding,
    )
    found, basis = head_coordinates(parts, run), head_basis(parts)
    assert found.shape == (IMAGES, LAYERS, HEADS, min(n_pool * D_HEAD, width))
    for image in range(IMAGES):
        for layer in range(LAYERS):
            for head in range(HEADS):
                adds = torch.zeros(width)
                for pool in range(n_pool):
                    adds += z[image, layer, pool, head] @ parts.out[layer, head] @ parts.readers[pool]
                want = adds / embedding[image].norm()
                got = found[image, layer, head] @ basis[layer, head]
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_masks_and_their_scores_are_what_they_say() -> None:
    maps = torch.tensor([[[-1.0, 0.2, 0.6], [0.0, 1.0, 0.4]], [[3.0, 0.0, 0.0], [1.0, 2.0, 0.0]]])
    assert above(maps, 0.5).tolist() == [[[False, False, True], [False, True, False]],
                                         [[True, False, False], [False, True, False]]]  # fmt: skip
    # Below zero counts as zero: the means are 2.2 / 6 and 2 / 6 of the largest.
    assert above(maps, None).tolist() == [[[False, False, True], [False, True, True]],
                                          [[True, False, False], [False, True, False]]]  # fmt: skip
    truth = torch.tensor([[[False, False, True], [False, True, False]], [[True, True, False], [False] * 3]])
    scores = segmentation_scores(maps, truth, 0.5)
    # Marked: 2 + 2, of which 2 + 1 are true; 1 + 1 objects' pixels are missed or wrong.
    assert scores.pixel_accuracy == pytest.approx(10 / 12)
    assert scores.foreground_iou == pytest.approx(3 / 5)
    assert scores.mean_iou == pytest.approx((3 / 5 + 7 / 9) / 2)
    # The second map puts a true pixel first and one among the last.
    assert scores.average_precision == pytest.approx((1.0 + (1 / 2 * 1 + 1 / 2 * 2 / 6)) / 2)
    chosen = best_threshold(maps, truth)
    best = max(segmentation_scores(maps, truth, t).mean_iou for t in (None, *(i / 10 for i in range(1, 10))))
    assert segmentation_scores(maps, truth, chosen).mean_iou == pytest.approx(best)
