"""Embeddings as a few words each: sparse non-negative weights over a vocabulary of concepts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from methods_multimodal.core.embed import unit
from methods_multimodal.core.record import Record
from methods_multimodal.text_explanations.sparse_coding import solve
from mm_adapters import InputError

_AT_ONCE = 256


@dataclass(frozen=True)
class Dictionary(Record):
    """A vocabulary as directions: unit vectors, centred, and of length one again.

    `text_mean` is what was taken off; `concepts` the words.
    """

    directions: Float[Tensor, "concept width"]
    text_mean: Float[Tensor, " width"]
    concepts: tuple[str, ...]


@dataclass(frozen=True)
class Splice(Record):
    """Each embedding's concepts. `reconstruction` are unit vectors, rebuilt from the weights alone.

    `cosine` is between an embedding and its reconstruction, `mean` what was taken off the embeddings.
    """

    weights: Float[Tensor, "embedding concept"]
    reconstruction: Float[Tensor, "embedding width"]
    cosine: Float[Tensor, " embedding"]
    mean: Float[Tensor, " width"]
    l1: float
    concepts: tuple[str, ...]

    @property
    def n_concepts(self) -> Float[Tensor, ""]:
        """How many concepts an embedding has, on average."""
        return (self.weights > 0).sum(1).float().mean()

    def top(self, embedding: int, n: int = 10) -> list[tuple[str, float]]:
        """One embedding's heaviest concepts, with their weights."""
        values, places = self.weights[embedding].topk(min(n, self.weights.shape[1]))
        pairs = zip(places.tolist(), values.tolist(), strict=True)
        return [(self.concepts[i], value) for i, value in pairs if value > 0]


def dictionary(texts: Float[Tensor, "concept width"], concepts: Sequence[str] | None = None) -> Dictionary:
    """The directions of a vocabulary's text embeddings."""
    directions = unit(texts)
    mean = directions.mean(0)
    names = tuple(concepts) if concepts is not None else tuple(f"concept {i}" for i in range(len(texts)))
    return Dictionary(unit(directions - mean), mean, names)


def image_mean(embeddings: Float[Tensor, "image width"]) -> Float[Tensor, " width"]:
    """The mean of unit image embeddings, to be taken off before they are split. Use a few hundred or more."""
    return unit(embeddings).mean(0)


def splice(
    embeddings: Float[Tensor, "embedding width"],
    words: Dictionary,
    *,
    l1: float = 0.25,
    image_mean: Float[Tensor, " width"] | None = None,
    target: float | None = None,
) -> Splice:
    """Sparse non-negative concept weights of any embeddings, all solved together and exactly.

    Of z, the unit embedding, centred and of length one again, the weights make |w D - z|^2 + l1 |w| least
    with w >= 0. `image_mean` centres images (None: that of these embeddings); for embeddings of texts
    give the dictionary's own `text_mean`. With a `target`, `l1` is searched so that an embedding has
    about so many concepts on average.

    Source: Bhalla et al. 2024, arXiv 2402.10376, equations 3 to 5.
    Raises: InputError if widths differ, `l1` is not positive, or a target is out of reach.
    """
    if embeddings.shape[1] != words.directions.shape[1]:
        raise InputError(
            f"Embeddings are {embeddings.shape[1]} wide, the dictionary {words.directions.shape[1]}."
        )
    if l1 <= 0:
        raise InputError(f"l1 is the price of weight and must be above zero, not {l1}.")
    mean = unit(embeddings).mean(0) if image_mean is None else image_mean.to(embeddings)
    targets = unit(unit(embeddings.float()) - mean.float())
    directions = words.directions.to(targets)
    if target is not None:
        l1 = _penalty_for(targets, directions, target)
    weights = torch.cat([solve(part, directions, l1) for part in targets.split(_AT_ONCE)])
    return _splice_of(weights, embeddings, words, mean, l1)


def intervene(split: Splice, words: Dictionary, changes: Mapping[str, float]) -> Splice:
    """The same embeddings with the weights of some concepts set to other values (0 removes one).

    Raises: InputError for a concept that is not in the vocabulary.
    """
    unknown = [name for name in changes if name not in words.concepts]
    if unknown:
        raise InputError(f"{', '.join(map(repr, unknown))}: no such concept in this vocabulary.")
    weights = split.weights.clone()
    for name, value in changes.items():
        weights[:, words.concepts.index(name)] = value
    changed = _splice_of(weights, split.reconstruction, words, split.mean, split.l1)
    return replace(changed, cosine=split.cosine)


def _splice_of(weights: Tensor, embeddings: Tensor, words: Dictionary, mean: Tensor, l1: float) -> Splice:
    rebuilt = unit(unit(weights @ words.directions.to(weights)) + mean.to(weights))
    cosine = (rebuilt * unit(embeddings.float())).sum(-1)
    return Splice(weights, rebuilt, cosine, mean, l1, words.concepts)


def _penalty_for(targets: Tensor, directions: Tensor, target: float) -> float:
    """Halves an interval of penalties until a sample has about `target` concepts a row."""
    sample = targets[:64]
    # Above this no concept has weight.
    high = float(2 * (sample @ directions.T).max())
    low, largest = high * 1e-2, float((solve(sample, directions, high * 1e-2) > 0).sum(1).float().mean())
    if not 0 < target <= largest:
        raise InputError(f"{target} concepts each are out of reach here: it can be up to {largest:.0f}.")
    for _ in range(18):
        middle = (low * high) ** 0.5
        many = float((solve(sample, directions, middle) > 0).sum(1).float().mean())
        low, high = (middle, high) if many > target else (low, middle)
    return (low * high) ** 0.5
