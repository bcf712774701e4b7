"""Network dissection: how well a unit's strongest places coincide with a concept's pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from methods_multimodal.core.record import Record
from methods_multimodal.dissection.concepts import Concepts, Masks, stacked
from methods_multimodal.dissection.thresholds import TopShare
from methods_multimodal.dissection.units import Units
from mm_adapters import InputError

Counted = Literal["paper", "lite"]
DETECTOR = 0.04


@dataclass(frozen=True)
class NetworkDissection(Record):
    """`iou[unit, concept]`, in [0, 1], at each unit's threshold; concepts as in `names`, `categories`."""

    iou: Float[Tensor, "unit concept"]
    thresholds: Float[Tensor, " unit"]
    names: tuple[str, ...]
    categories: tuple[str, ...]
    site: str
    n_images: int

    def best(self) -> list[tuple[str, float]]:
        """Each unit's concept of largest IoU, and that IoU."""
        value, which = self.iou.max(1)
        return [(self.names[i], v) for i, v in zip(which.tolist(), value.tolist(), strict=True)]

    def detectors(self, min_iou: float = DETECTOR) -> list[int]:
        """The units whose best IoU is above `min_iou` (0.04 in the paper)."""
        return (self.iou.amax(1) > min_iou).nonzero().flatten().tolist()


def network_dissection(
    units: Units,
    batches: Sequence[Mapping[str, Any]],
    masks: Sequence[Masks],
    concepts: Concepts,
    *,
    share: float = 0.005,
    counted: Counted = "paper",
    progress: bool = True,
) -> NetworkDissection:
    """The IoU of each unit's strongest places with each concept.

    A unit's threshold is exceeded at a share of all places; its maps are brought to the masks' size
    bilinearly. Two passes over the batches: thresholds, then overlaps.

    Args:
        units: The units of one site.
        batches: Inputs of the model, a picture a row.
        masks: What each picture shows, in the same order.
        concepts: The concepts that masks are of.
        share: The share of all places at which a unit exceeds its threshold.
        counted: Unions count the pictures that show anything of the concept's category ("paper"), or only
            those where the unit's places touch something of it ("lite", as NetDissect-Lite).
        progress: Whether to show progress bars.

    Source: Bau et al. 2017, arXiv 1704.05796, section 2.3.
    Raises: InputError if pictures and masks differ in number, or a mask is of no concept.
    """
    for shown in masks:
        stacked(shown, concepts)
    thresholds, n_images = _thresholds(units, batches, share, len(masks), progress)
    overlap = Overlap(concepts, len(thresholds), counted)
    for first, maps in _maps(units, batches, progress, "overlaps"):
        for row, map_ in enumerate(maps):
            overlap.add(map_, thresholds, masks[first + row])
    return NetworkDissection(
        overlap.iou(), thresholds, concepts.names, concepts.categories, units.site, n_images
    )


class Overlap:
    """Counts of pixels that a unit and a concept share, over pictures."""

    def __init__(self, concepts: Concepts, n_units: int, counted: Counted = "paper") -> None:
        self._concepts, self._members, self._counted = concepts, concepts.members(), counted
        n_categories = int(self._members.max()) + 1
        self._shared = torch.zeros(n_units, len(concepts), dtype=torch.float64)
        self._of_unit = torch.zeros(n_units, n_categories, dtype=torch.float64)
        self._of_concept = torch.zeros(n_units, len(concepts), dtype=torch.float64)

    def add(
        self, maps: Float[Tensor, "unit row column"], thresholds: Float[Tensor, " unit"], masks: Masks
    ) -> None:
        """Takes one picture into account."""
        present, where = stacked(masks, self._concepts)
        if not present:
            return
        on = upsampled(maps, (int(where.shape[1]), int(where.shape[2]))) > thresholds[:, None, None]
        active = on.flatten(1).float().cpu()
        shown = where.flatten(1).float()
        shared = (active @ shown.T).double()
        self._shared[:, present] += shared
        members = self._members[present]
        for category in members.unique().tolist():
            mine = [p for p, m in zip(present, members.tolist(), strict=True) if m == category]
            counts = torch.ones(len(active), dtype=torch.float64)
            if self._counted == "lite":
                counts = (shared[:, members == category].sum(1) > 0).double()
            self._of_unit[:, category] += counts * active.sum(1).double()
            areas = shown[members == category].sum(1).double()
            self._of_concept[:, mine] += counts[:, None] * areas[None]

    def iou(self) -> Float[Tensor, "unit concept"]:
        """Shared pixels over pixels of either."""
        union = self._of_unit[:, self._members] + self._of_concept - self._shared
        return torch.where(union > 0, self._shared / union.clamp_min(1), 0.0).float()


def upsampled(
    maps: Float[Tensor, "unit row column"], size: tuple[int, int]
) -> Float[Tensor, "unit height width"]:
    """The maps at the size of a picture, bilinearly between the middles of their cells."""
    return torch.nn.functional.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]


def active_places(
    maps: Float[Tensor, "image unit row column"], thresholds: Float[Tensor, " unit"]
) -> Bool[Tensor, "image unit row column"]:
    """Where each unit is above its threshold, on its own grid."""
    return maps > thresholds[None, :, None, None]


def _thresholds(
    units: Units, batches: Sequence[Mapping[str, Any]], share: float, n_masks: int, progress: bool
) -> tuple[Tensor, int]:
    top: TopShare | None = None
    n_images = 0
    for _, maps in _maps(units, batches, progress, "thresholds"):
        if top is None:
            top = TopShare(share, n_masks * maps.shape[2] * maps.shape[3])
        n_images += len(maps)
        if n_images > n_masks:
            break
        top.add(maps.movedim(1, -1).flatten(0, 2))
    if top is None or n_images != n_masks:
        raise InputError(f"There are {n_images} pictures or more, and masks of {n_masks}.")
    return top.threshold(), n_images


def _maps(units: Units, batches: Sequence[Mapping[str, Any]], progress: bool, what: str):
    first = 0
    for batch in tqdm(batches, desc=f"{units.site}: {what}", disable=not progress):
        maps = units.maps(batch)
        yield first, maps
        first += len(maps)
