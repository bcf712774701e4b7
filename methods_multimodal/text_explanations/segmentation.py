"""Which pixels a text is about, from what each patch adds to the image's embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from sklearn.metrics import average_precision_score, jaccard_score
from torch import Tensor

from methods_multimodal.core.batches import batches
from methods_multimodal.core.record import Record
from methods_multimodal.core.statistics import iou
from methods_multimodal.text_explanations.decomposition import split
from methods_multimodal.text_explanations.pooled_run import run_pooled
from methods_multimodal.text_explanations.tower_parts import tower_parts
from mm_adapters import InputError, Model


@dataclass(frozen=True)
class Segmentation(Record):
    """How much each pixel speaks for each text of its image, rather than for the average text.

    `maps` are stretched to the size of the pixels the model saw; `chosen` numbers the texts.
    """

    maps: Float[Tensor, "image text height width"]
    chosen: Int[Tensor, "image chosen"]
    grid: tuple[int, int]

    def masks(self, threshold: float | None = None) -> Bool[Tensor, "image text height width"]:
        """What lies above the threshold, between 0 and the map's largest value (None: above its mean)."""
        return above(self.maps, threshold)


@dataclass(frozen=True)
class SegmentationScores(Record):
    """How good masks and maps are: over all pixels of all maps, and `average_precision` map by map."""

    pixel_accuracy: float
    mean_iou: float
    foreground_iou: float
    average_precision: float


def segment(
    model: Model,
    images: Any,
    texts: Float[Tensor, "text width"],
    chosen: Int[Tensor, "image chosen"] | None = None,
    *,
    shifts: int = 1,
    batch_size: int = 16,
) -> Segmentation:
    """A map for each image and text: the patches' parts of the embedding, compared with the text.

    Contributions of all heads and layers are summed by the patch they came from and taken along the
    text's direction less the mean direction of all texts. `texts` are unit vectors, such as a
    classifier's; `chosen` says which of them to map for each image (None: the likeliest one).
    With `shifts` the images (prepared pixels) are also seen moved by parts of a patch, `shifts` times
    in each direction, and the maps are put back and averaged: finer than the grid of patches.

    Source: Gandelsman et al. 2024, arXiv 2310.05916, section 5.2 (without shifts).
    Raises: MissingSiteError if the tower cuts no patches or cannot be decomposed; InputError if pixels must
    be moved and are not given.
    """
    against = texts - texts.mean(0)
    if shifts == 1:
        return _maps(model, images, against, chosen, batch_size)
    if not isinstance(images, Tensor) or images.ndim != 4:
        raise InputError("To see images moved by parts of a patch, pass them as prepared pixels.")
    total, size = None, images.shape[-2:]
    first = _maps(model, images, against, chosen, batch_size)
    patch = size[0] // first.grid[0]
    for down in range(shifts):
        for across in range(shifts):
            by = [round((i + 0.5) * patch / shifts - patch / 2) for i in (down, across)]
            moved = _maps(model, _moved(images, by, patch), against, first.chosen, batch_size)
            back = _moved(moved.maps.flatten(0, 1).unsqueeze(1), [-by[0], -by[1]], patch)
            total = back if total is None else total + back
    assert total is not None
    return Segmentation(total.reshape(first.maps.shape) / shifts**2, first.chosen, first.grid)


def above(
    maps: Float[Tensor, "*map height width"], threshold: float | None
) -> Bool[Tensor, "*map height width"]:
    """What lies above a threshold on a map's range, 0 its middle ground and 1 its largest value.

    What speaks against the text (below zero) counts as zero. None is the mean of the map.
    """
    kept = maps.clamp_min(0)
    low, high = kept.amin((-2, -1), keepdim=True), kept.amax((-2, -1), keepdim=True)
    scaled = (kept - low) / (high - low).clamp_min(1e-12)
    return scaled > (scaled.mean((-2, -1), keepdim=True) if threshold is None else threshold)


def segmentation_scores(
    maps: Float[Tensor, "map height width"],
    truth: Bool[Tensor, "map height width"],
    threshold: float | None = None,
) -> SegmentationScores:
    """Pixel accuracy, IoU of object and background (their mean is mIoU), and average precision."""
    marked, true = above(maps, threshold).flatten().cpu().numpy(), truth.flatten().cpu().numpy()
    ious = [jaccard_score(true, marked), jaccard_score(~true, ~marked)]
    precision = [
        average_precision_score(t.flatten().cpu().numpy(), m.flatten().cpu().numpy())
        for m, t in zip(maps, truth, strict=True)
    ]
    return SegmentationScores(
        pixel_accuracy=float((marked == true).mean()),
        mean_iou=float(np.mean(ious)),
        foreground_iou=float(ious[0]),
        average_precision=float(np.mean(precision)),
    )


def best_threshold(
    maps: Float[Tensor, "map height width"], truth: Bool[Tensor, "map height width"]
) -> float | None:
    """The threshold with the largest mIoU on these maps, to be used on others."""
    options: list[float | None] = [None, *(round(0.1 * i, 1) for i in range(1, 10))]
    true = truth.flatten(1)

    def mean_iou(option: float | None) -> float:
        marked = above(maps, option).flatten(1)
        return float((iou(marked, true) + iou(~marked, ~true)) / 2)

    return max(options, key=mean_iou)


def _maps(model: Model, images: Any, against: Tensor, chosen: Tensor | None, batch_size: int) -> Segmentation:
    """The maps of these images, each stretched to the size of the pixels that the model saw."""
    parts = tower_parts(model, "vision")
    if against.shape[-1] != parts.width:
        raise InputError(f"The texts are {against.shape[-1]} wide; the embedding is {parts.width}.")
    maps, picked, grid, start = [], [], None, 0
    for inputs in batches(model, parts.tower, images, batch_size):
        pixels = inputs[parts.tower.input_name]
        grid = parts.tower.patch_grid(pixels)
        part = split(parts, run_pooled(model, parts, inputs, tokens=True), onto=against, grid=grid)
        n = len(part.own)
        which = part.own.argmax(1, keepdim=True) if chosen is None else chosen[start : start + n]
        which = which.to(part.own.device)
        start += n
        patches = part.heads.sum((1, 3))[:, -grid[0] * grid[1] :]
        taken = patches.gather(2, which.unsqueeze(1).expand(-1, patches.shape[1], -1))
        coarse = taken.mT.reshape(n, which.shape[1], *grid)
        maps.append(F.interpolate(coarse, size=pixels.shape[-2:], mode="bilinear", align_corners=False))
        picked.append(which)
    if grid is None:
        raise InputError("There is no image to segment.")
    return Segmentation(torch.cat(maps), torch.cat(picked), grid)


def _moved(x: Float[Tensor, "row channel height width"], by: list[int], margin: int) -> Tensor:
    """Each picture moved down and right by so many pixels; its edge is repeated."""
    height, width = x.shape[-2:]
    wide = F.pad(x, (margin,) * 4, mode="replicate")
    return wide[..., margin - by[0] : margin - by[0] + height, margin - by[1] : margin - by[1] + width]
