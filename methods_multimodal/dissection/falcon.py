"""FALCON: concepts for groups of units, from crops they fire on, less what similar images show."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mm_adapters import InputError

# The published code's: an image is near the group's if what the other units say has this cosine.
_NEAR = 0.3
_TEMPERATURE = 100.0


@dataclass(frozen=True)
class Group:
    """Units that fire together on the same images, and the words for those images.

    `coherence` is the mean cosine between the images' embeddings. `words` are (name, score), the mean
    probability of the name; `dropped` are those that similar images without the units show as well.
    """

    units: tuple[int, ...]
    images: tuple[int, ...]
    coherence: float
    words: tuple[tuple[str, float], ...]
    dropped: tuple[str, ...]


def falcon(
    activations: Float[Tensor, "image unit"],
    embeddings: Float[Tensor, "image width"],
    texts: Float[Tensor, "concept width"],
    names: Sequence[str],
    *,
    n_deviations: float = 5.0,
    min_images: int = 10,
    coherence: float = 0.8,
    n_words: int = 8,
    contrast: float = 0.1,
    n_contrast: int = 10,
) -> list[Group]:
    """Groups of units with one meaning, the largest first, in words.

    A unit fires where its share of the image's (unit-length) activations is `n_deviations` standard
    deviations above the mean of all. A group is a set of units that fires, and nothing else does, on more
    than `min_images` images which look alike. Words that score `contrast` or more on images that the
    rest of the units find similar, but on which the group does not fire, are dropped.

    Args:
        activations: Of each unit on each image.
        embeddings: A judge's unit vectors of the images, or of crops around where the units fire.
        texts: The judge's unit vectors of the concepts.
        names: The concepts.
        n_deviations: How many standard deviations above the mean a unit fires.
        min_images: A group has more images than this.
        coherence: A group's images have a mean cosine above this.
        n_words: The most words of a group.
        contrast: Words that score as much on images without the group are dropped.
        n_contrast: How many such images are looked at.

    Source: Kalibhat et al. 2023, arXiv 2306.12079, sections 3 and 4.
    """
    if not (len(activations) == len(embeddings) and len(texts) == len(names)):
        raise InputError(
            f"{len(activations)} images have {len(embeddings)} embeddings; "
            f"{len(names)} names have {len(texts)}."
        )
    shares = torch.nn.functional.normalize(activations.float(), dim=1)
    mean = shares.mean()
    fires = shares > mean + n_deviations * shares.std()
    members: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for image, row in enumerate(fires):
        if row.any():
            members[tuple(row.nonzero().flatten().tolist())].append(image)
    likely = torch.softmax(_TEMPERATURE * embeddings.float() @ texts.float().T, 1)
    groups = []
    for units, images in members.items():
        alike = _coherence(embeddings[images])
        if len(images) <= min_images or alike <= coherence:
            continue
        score = likely[images].mean(0)
        inactive = _inactive_but_near(shares, mean, list(units), images)[:n_contrast]
        common = likely[inactive].mean(0) if inactive else torch.zeros_like(score)
        order = score.argsort(descending=True)[: 2 * n_words].tolist()
        kept: Any = tuple((names[i], float(score[i])) for i in order if common[i] < contrast)[:n_words]
        dropped: Any = tuple(names[i] for i in order if common[i] >= contrast)
        groups.append(Group(units, tuple(images), alike, kept, dropped))
    return sorted(groups, key=lambda group: -len(group.images))


def _coherence(embeddings: Float[Tensor, "image width"]) -> float:
    """The mean cosine of two different ones."""
    n = len(embeddings)
    if n < 2:
        return 0.0
    cosines = embeddings.float() @ embeddings.float().T
    return float((cosines.sum() - cosines.diagonal().sum()) / (n * (n - 1)))


def _inactive_but_near(
    shares: Float[Tensor, "image unit"], mean: Tensor, units: list[int], images: list[int]
) -> list[int]:
    """Images on which none of the units fires and the others are as on these images, nearest first."""
    others = torch.ones(shares.shape[1], dtype=torch.bool)
    others[units] = False
    rest = torch.nn.functional.normalize(shares[:, others], dim=1)
    near = rest @ torch.nn.functional.normalize(rest[images].mean(0), dim=0)
    candidates = (shares[:, units] < mean).all(1) & (near >= _NEAR)
    candidates[images] = False
    images_near = candidates.nonzero().flatten()
    return images_near[near[images_near].argsort(descending=True)].tolist()
