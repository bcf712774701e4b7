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

from methods_multimodal.core.record import Record
from methods_multimodal.text_explanations.decomposition import decompositions
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
    Raises: InputError if the tower has no grid of patches, or pixels must be moved and are not given.
    """
    against = texts - texts.mean(0)
    if shifts == 1:
        return _seen(model, images, against, chosen, batch_size)
    if not isinstance(images, Tensor) or images.ndim != 4:
        raise InputError("To see images moved by parts of a patch, pass them as prepared pixels.")
    made, size = None, images.shape[-2:]
    first = _seen(model, images, against, chosen, batch_size)
    patch = size[0] // first.grid[0]
    for down in range(shifts):
        for across in range(shifts):
            by = [round((i + 0.5) * patch / shifts - patch / 2) for i in (down, across)]
            moved = _seen(model, _moved(images, by, patch), against, first.chosen, batch_size)
            back = _moved(moved.maps.flatten(0, 1).unsqueeze(1), [-by[0], -by[1]], patch)
            made = back if made is None else made + back
    assert made is not None
    return Segmentation(made.reshape(first.maps.shape) / shifts**2, first.chosen, first.grid)


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
    said, true = above(maps, threshold).flatten().cpu().numpy(), truth.flatten().cpu().numpy()
    own = [jaccard_score(true, said), jaccard_score(~true, ~said)]
    precision = [
        average_precision_score(t.flatten().cpu().numpy(), m.flatten().cpu().numpy())
        for m, t in zip(maps, truth, strict=True)
    ]
    return SegmentationScores(
        pixel_accuracy=float((said == true).mean()),
        mean_iou=float(np.mean(own)),
        foreground_iou=float(own[0]),
        average_precision=float(np.mean(precision)),
    )


def best_threshold(
    maps: Float[Tensor, "map height width"], truth: Bool[Tensor, "map height width"]
) -> float | None:
    """The threshold with the largest mIoU on these maps, to be used on others."""
    options: list[float | None] = [None, *(round(0.1 * i, 1) for i in range(1, 10))]
    true = truth.flatten()

    def mean_iou(option: float | None) -> float:
        said = above(maps, option).flatten()
        both, neither = (said & true).sum(), (~said & ~true).sum()
        return float((both / (said | true).sum() + neither / (~said | ~true).sum()) / 2)

    return max(options, key=mean_iou)


def _seen(model: Model, images: Any, against: Tensor, chosen: Tensor | None, batch_size: int) -> Segmentation:
    maps, picked, grid, start = [], [], None, 0
    for part in decompositions(model, images=images, onto=against, batch_size=batch_size):
        grid = part.grid
        if grid is None:
            raise InputError("This tower does not cut images into patches, so there is no map.")
        n = len(part.own)
        which = (
            part.own.argmax(1, keepdim=True)
            if chosen is None
            else chosen[start : start + n].to(part.own.device)
        )
        start += n
        patches = part.heads.sum((1, 3))[:, -grid[0] * grid[1] :]
        taken = patches.gather(2, which.unsqueeze(1).expand(-1, patches.shape[1], -1))
        maps.append(taken.mT.reshape(n, which.shape[1], *grid))
        picked.append(which)
    if grid is None:
        raise InputError("There is no image to segment.")
    flat = torch.cat(maps)
    size = _size(model, images)
    up = F.interpolate(flat, size=size, mode="bilinear", align_corners=False) if size else flat
    return Segmentation(up, torch.cat(picked), grid)


def _size(model: Model, images: Any) -> tuple[int, int] | None:
    if isinstance(images, Tensor):
        return int(images.shape[-2]), int(images.shape[-1])
    tower = model.sitemap.towers["vision"]
    cut: Any = tower.module.get_submodule(tower.record.patch or "")
    inputs: Any = getattr(model, "inputs", None)
    own = getattr(inputs, "image_size", None)
    return own or getattr(cut, "image_size", None)


def _moved(x: Float[Tensor, "row channel height width"], by: list[int], margin: int) -> Tensor:
    """Each picture moved down and right by so many pixels; its edge is repeated."""
    height, width = x.shape[-2:]
    wide = F.pad(x, (margin,) * 4, mode="replicate")
    return wide[..., margin - by[0] : margin - by[0] + height, margin - by[1] : margin - by[1] + width]
