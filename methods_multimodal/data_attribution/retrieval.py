"""Scores by likeness: how near each training image lies to a query in pixels or in a model's features."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate, normalize
from tqdm.auto import tqdm

from methods_multimodal.core.embed import embed
from methods_multimodal.core.record import Record
from mm_adapters import InputError, Model


def pixel_features(images: Float[Tensor, "image channel height width"]) -> Float[Tensor, "image pixel"]:
    """The pixels of images in [0, 1], seen from gray, as unit vectors."""
    return normalize((images.float() - 0.5).flatten(1), dim=1)


def image_features(
    model: Model,
    images: Float[Tensor, "image 3 height width"],
    *,
    tower: str = "vision",
    batch_size: int = 64,
) -> Float[Tensor, "image feature"]:
    """Unit vectors of images in [0, 1] by a model with an image tower: CLIP, SigLIP, DINO, a ViT, ...

    They are scaled and prepared as the model asks.
    """
    from torchvision.transforms.functional import to_pil_image

    pictures = [to_pil_image(image.clamp(0, 1).cpu()) for image in images.float()]
    return normalize(embed(model, pictures, tower, batch_size).float().cpu(), dim=1)


def similarity(
    queries: Float[Tensor, "query width"], examples: Float[Tensor, "example width"]
) -> Float[Tensor, "query example"]:
    """The cosine of every query with every example."""
    return normalize(queries.float(), dim=1) @ normalize(examples.float(), dim=1).T


@dataclass(frozen=True)
class Nearest(Record):
    """The examples nearest to each query by cosine, best first."""

    examples: Int[Tensor, "query rank"]
    similarity: Float[Tensor, "query rank"]


def nearest(
    queries: Float[Tensor, "query width"],
    examples: Iterable[Float[Tensor, "example width"]] | Float[Tensor, "example width"],
    k: int = 10,
) -> Nearest:
    """The exact `k` nearest of any number of examples, given at once or part by part, through faiss.

    Raises: InputError if faiss is not installed, or there are fewer than `k` examples.
    """
    try:
        import faiss
    except ImportError:
        raise InputError("Searching needs faiss: pip install faiss-cpu (mm-interp[attribution]).") from None
    index = faiss.IndexFlatIP(queries.shape[1])
    for part in [examples] if isinstance(examples, Tensor) else examples:
        index.add(_rows(part))
    if not 0 < k <= index.ntotal:
        raise InputError(f"The {k} nearest of {index.ntotal} examples were asked for.")
    similarities, where = index.search(_rows(queries), k)
    return Nearest(torch.from_numpy(where), torch.from_numpy(similarities))


@dataclass(frozen=True)
class LinearMap(Record):
    """A linear map of features, learned from queries whose sources are known, and a temperature.

    `weight` [width, width] comes after the features, `temperature` before a softmax over examples.
    """

    weight: Float[Tensor, "out width"]
    temperature: float

    def __call__(self, features: Float[Tensor, "row width"]) -> Float[Tensor, "row out"]:
        return normalize(normalize(features.float(), dim=1) @ self.weight.T, dim=1)

    def probabilities(
        self, queries: Float[Tensor, "query width"], examples: Float[Tensor, "example width"]
    ) -> Float[Tensor, "query example"]:
        """How likely each example is to be a query's source; each row sums to one."""
        return (self(queries) @ self(examples).T / self.temperature).softmax(1)


def fit_linear_map(
    queries: Float[Tensor, "query width"],
    examples: Float[Tensor, "example width"],
    sources: Bool[Tensor, "query example"],
    *,
    contrast: float = 0.07,
    regularisation: float = 0.1,
    rate: float = 1e-3,
    steps: int = 300,
) -> LinearMap:
    """Learns which directions of a feature say where a picture came from.

    Both sides of a contrastive loss at temperature `contrast`: a query among the examples, and an example
    among the queries, each with its known partners as the right answers; the map is held near a
    rotation by `regularisation` times |W'W - I|^2 over the width. The softmax's temperature is then
    fitted to the same queries by likelihood.

    Source: Wang et al. 2023, arXiv 2306.09345, sections 4.1 (map) and 4.2 (calibration).
    Raises: InputError for a query without a source.
    """
    if tuple(sources.shape) != (len(queries), len(examples)) or not bool(sources.any(1).all()):
        raise InputError(
            f"Sources are [query, example] = [{len(queries)}, {len(examples)}] with at least one a query; "
            f"these are {list(sources.shape)}."
        )
    a, b = normalize(queries.float(), dim=1), normalize(examples.float(), dim=1)
    is_source = sources.float()
    used = sources.any(0)
    weight = torch.eye(a.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=rate)
    one = torch.eye(a.shape[1])
    for _ in tqdm(range(steps), desc="linear map", unit="step", disable=None):
        logits = normalize(a @ weight.T, dim=1) @ normalize(b @ weight.T, dim=1).T / contrast
        loss = _cross_entropy(logits, is_source) + _cross_entropy(logits.T[used], is_source.T[used])
        loss = loss + regularisation * (weight.T @ weight - one).square().mean() * len(one)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    learned = weight.detach()
    cosines = normalize(a @ learned.T, dim=1) @ normalize(b @ learned.T, dim=1).T
    return LinearMap(learned, fit_temperature(cosines, sources))


def fit_temperature(
    similarities: Float[Tensor, "query example"], sources: Bool[Tensor, "query example"]
) -> float:
    """The temperature at which a softmax of similarities gives known sources the highest likelihood."""
    is_source = sources.float()
    grid = torch.logspace(-3, 1, 401)
    losses = torch.stack([_cross_entropy(similarities.float() / t, is_source) for t in grid])
    return float(grid[losses.argmin()])


def nearest_other(features: Float[Tensor, "example width"]) -> Float[Tensor, " example"]:
    """Each example's cosine with the nearest other one: high for duplicates."""
    alike = cosine_similarity(features[:, None], features[None], dim=2)
    return alike.fill_diagonal_(-torch.inf).amax(1)


def enlarged(
    images: Float[Tensor, "image channel height width"], side_px: int
) -> Float[Tensor, "image channel side side"]:
    """Small pictures at the size a model reads."""
    return interpolate(images.float(), size=(side_px, side_px), mode="bicubic", antialias=True)


def _cross_entropy(logits: Tensor, is_right: Tensor) -> Tensor:
    share = is_right / is_right.sum(1, keepdim=True)
    return -(share * logits.log_softmax(1)).sum(1).mean()


def _rows(features: Tensor) -> np.ndarray:
    return np.ascontiguousarray(normalize(features.detach().float(), dim=1).cpu().numpy())
