"""Segmentation metrics against counting by hand, and against what chance gives."""

from __future__ import annotations

import pytest
import torch

import mm_adapters as mm
from methods_multimodal.cross_attention.segmentation import THRESHOLDS, average_precision, iou, masks, segment


def test_iou_counts_pixels() -> None:
    found = torch.tensor([[[True, True], [False, False]]])
    region = torch.tensor([[[True, False], [True, False]]])
    assert iou(found, region).tolist() == [pytest.approx(1 / 3)]


def test_average_precision_equals_walking_down_the_ranking() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(3, 5, 7, generator=generator)
    regions = torch.rand(3, 5, 7, generator=generator) > 0.7
    for values, region, found in zip(maps, regions, average_precision(maps, regions), strict=True):
        order = values.flatten().argsort(descending=True)
        hits, total = 0, 0.0
        for rank, pixel in enumerate(order.tolist(), start=1):
            if region.flatten()[pixel]:
                hits += 1
                total += hits / rank
        assert float(found) == pytest.approx(total / hits, rel=1e-6)


def test_a_map_that_says_nothing_has_the_precision_of_chance() -> None:
    region = torch.zeros(1, 10, 10, dtype=torch.bool)
    region[0, :3] = True
    assert float(average_precision(torch.ones(1, 10, 10), region)) == pytest.approx(0.3)


def test_a_map_of_the_region_itself_is_perfect_and_its_threshold_is_found() -> None:
    region = torch.zeros(2, 16, 16, dtype=torch.bool)
    region[:, 4:9, 5:11] = True
    maps = region.float() * 0.3 + 0.1
    found = segment(maps, region)
    assert found.mean_iou(found.best) == 1.0
    assert found.precision.tolist() == [1.0, 1.0]
    assert torch.equal(masks(maps, 0.5), region)
    assert found.thresholds == THRESHOLDS
    with pytest.raises(mm.InputError, match="No IoU at"):
        found.mean_iou(0.123)


def test_an_empty_region_is_refused() -> None:
    with pytest.raises(mm.InputError, match=r"\[1\] are empty"):
        segment(torch.rand(2, 4, 4), torch.tensor([True, False])[:, None, None].expand(2, 4, 4))
