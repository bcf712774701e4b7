"""How well maps agree with given regions: masks at a threshold, IoU, average precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from sklearn.metrics import average_precision_score
from torch import Tensor

from methods_multimodal.core.record import Record
from methods_multimodal.core.statistics import iou
from methods_multimodal.cross_attention._recipes import unit_range
from mm_adapters import InputError

THRESHOLDS = tuple(i / 20 for i in range(1, 20))


@dataclass(frozen=True)
class Segmentation(Record):
    """How maps overlap their regions: `iou[threshold][map]`, and each map's average precision."""

    iou: Float[Tensor, "threshold map"]
    precision: Float[Tensor, " map"]
    thresholds: tuple[float, ...]

    @property
    def best(self) -> float:
        """The threshold with the highest mean IoU. To report that IoU, take it on other maps."""
        return self.thresholds[int(self.iou.mean(1).argmax())]

    def mean_iou(self, threshold: float) -> float:
        """The mean over maps at one of the thresholds."""
        if threshold not in self.thresholds:
            raise InputError(f"No IoU at {threshold}; there is {', '.join(map(str, self.thresholds))}.")
        return float(self.iou[self.thresholds.index(threshold)].mean())


def masks(
    maps: Float[Tensor, "map height width"], threshold: float, size: tuple[int, int] | None = None
) -> Bool[Tensor, "map down across"]:
    """Where a map, stretched to `size` and to 0..1, is above a threshold.

    Source: Tang et al. 2022, arXiv 2210.04885, section 3 (there with a threshold of 0.4).
    """
    return _sized(maps, size or (maps.shape[-2], maps.shape[-1])) > threshold


def segment(
    maps: Float[Tensor, "map height width"],
    regions: Bool[Tensor, "map down across"],
    thresholds: Sequence[float] = THRESHOLDS,
) -> Segmentation:
    """Each map against its own region, at the region's size.

    Raises: InputError if a region is empty: no overlap is right or wrong there.
    """
    empty = (~regions.flatten(1).any(1)).nonzero().flatten().tolist()
    if empty:
        raise InputError(f"The regions {empty} are empty. Leave them and their maps out.")
    sized = _sized(maps, (regions.shape[-2], regions.shape[-1]))
    return Segmentation(
        iou=torch.stack([iou(sized > t, regions) for t in thresholds]),
        precision=average_precision(sized, regions),
        thresholds=tuple(float(t) for t in thresholds),
    )


def average_precision(
    maps: Float[Tensor, "map down across"], regions: Bool[Tensor, "map down across"]
) -> Float[Tensor, " map"]:
    """The precision at each of the region's pixels, taken from the hottest down, averaged.

    Pixels of one value are taken together. It needs no threshold; a map at chance has the region's share
    of the picture.
    """
    pairs = zip(regions.flatten(1).cpu().numpy(), maps.flatten(1).float().cpu().numpy(), strict=True)
    precision = [average_precision_score(truth, values) for truth, values in pairs]
    return torch.tensor(precision, dtype=torch.float32, device=maps.device)


def _sized(maps: Float[Tensor, "map _ _"], size: tuple[int, int]) -> Float[Tensor, "map down across"]:
    wide = F.interpolate(rearrange(maps, "m h w -> m 1 h w"), size=size, mode="bicubic", align_corners=False)
    return unit_range(rearrange(wide, "m 1 h w -> m h w"))
