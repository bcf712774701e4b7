"""The texts whose directions one head's output varies along."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from methods_multimodal.core.record import Record
from methods_multimodal.text_explanations.moments import Moments
from mm_adapters import InputError

# A direction with less than this of the largest singular value is rounding noise.
_NOISE = 1e-6


class NothingVariesError(InputError):
    """The vectors to be named are all the same, or differ in nothing that the texts are about."""


@dataclass(frozen=True)
class TextSpan(Record):
    """The texts that name a set of vectors, best first.

    `directions` are theirs, projected on what the vectors span and freed of those before; they are
    orthonormal. `variance_explained` is the share of all variance that lies along the first so
    many. `reconstruction` is of the vectors given; None if only their moments were.
    """

    chosen: tuple[int, ...]
    names: tuple[str, ...]
    directions: Float[Tensor, "chosen width"]
    variance_explained: Float[Tensor, " chosen"]
    mean: Float[Tensor, " width"]
    rank: int
    reconstruction: Float[Tensor, "image width"] | None = None

    def coordinates(self, vectors: Float[Tensor, "image width"]) -> Float[Tensor, "image chosen"]:
        """How far each vector lies from the mean along each chosen direction."""
        return (vectors - self.mean.to(vectors)) @ self.directions.to(vectors).T

    def reconstruct(self, vectors: Float[Tensor, "image width"]) -> Float[Tensor, "image width"]:
        """Each vector's part along the chosen directions, and the mean."""
        return self.mean.to(vectors) + self.coordinates(vectors) @ self.directions.to(vectors)


def text_span(
    heads: Float[Tensor, "image width"] | Moments,
    texts: Float[Tensor, "text width"],
    rank: int = 80,
    n_texts: int = 20,
    names: Sequence[str] | None = None,
) -> TextSpan:
    """Names the directions along which one head's output varies.

    Texts are projected on the `rank` leading right singular vectors of the output (never more than
    its numerical rank), and then, again and again, the text along which it varies most is chosen and
    projected out of output and texts. Everything is computed from mean and second moment, so `heads`
    may be those alone, of any number of images; the choices are the same. Fewer than `n_texts` are
    chosen where no variance is left.

    Source: Gandelsman et al. 2024, arXiv 2310.05916, Algorithm 1.
    Raises: InputError if there are fewer texts than `n_texts`, or `n_texts` is above `rank`;
    NothingVariesError if the output does not vary.
    """
    moments = heads if isinstance(heads, Moments) else Moments.of(heads)
    if not 0 < n_texts <= min(len(texts), rank):
        raise InputError(
            f"{n_texts} texts were asked for; with {len(texts)} texts and rank {rank} it can be 1 to "
            f"{min(len(texts), rank)}."
        )
    frame, covariance, total = leading(moments, rank)
    coordinates = texts.to(frame) @ frame.T
    chosen: list[int] = []
    axes: list[Tensor] = []
    gained: list[Tensor] = []
    for _ in range(min(n_texts, len(frame))):
        scores = ((coordinates @ covariance) * coordinates).sum(-1)
        best = int(scores.argmax())
        if scores[best] <= _NOISE**2 * total:
            break
        axis = coordinates[best] / coordinates[best].norm()
        chosen.append(best)
        axes.append(axis)
        gained.append(axis @ covariance @ axis)
        coordinates = coordinates - torch.outer(coordinates @ axis, axis)
        off = torch.eye(len(axis)).to(axis) - torch.outer(axis, axis)
        covariance = off @ covariance @ off
    if not chosen:
        raise NothingVariesError("None of the texts lies along what varies here; give other texts.")
    directions = torch.stack(axes) @ frame
    span = TextSpan(
        chosen=tuple(chosen),
        names=tuple(names[i] for i in chosen) if names is not None else tuple(f"text {i}" for i in chosen),
        directions=directions.float(),
        variance_explained=(torch.stack(gained).cumsum(0) / total).float(),
        mean=moments.mean.float(),
        rank=len(frame),
    )
    if isinstance(heads, Moments):
        return span
    wide = heads.double() - moments.mean
    built = (moments.mean + wide @ directions.T @ directions).to(heads.dtype)
    return TextSpan(**{**vars(span), "reconstruction": built})


def leading(
    moments: Moments, rank: int
) -> tuple[Float[Tensor, "rank width"], Float[Tensor, "rank rank"], Float[Tensor, ""]]:
    """Leading right singular vectors of the vectors, their covariance along these, and all variance."""
    if moments.count < 2:
        raise InputError(f"Variance needs at least two images; there are {moments.count}.")
    second, mean = moments.outer / moments.count, moments.total / moments.count
    frame = torch.eye(len(mean)).to(mean)
    if moments.basis is not None:  # Orthonormal coordinates of what the basis spans: exact, and narrow.
        outward, triangle = torch.linalg.qr(moments.basis.to(mean).T)
        second, mean, frame = triangle @ second @ triangle.T, triangle @ mean, outward.T
    values, vectors = torch.linalg.eigh(second)
    order = values.argsort(descending=True)
    values, vectors = values[order], vectors[:, order]
    total = second.trace() - mean @ mean
    if total <= _NOISE**2 * values[0]:
        raise NothingVariesError("These outputs are all the same, so no text says what they differ in.")
    kept = vectors[:, : min(rank, int((values > _NOISE**2 * values[0]).sum()))]
    centred = second - torch.outer(mean, mean)
    return kept.T @ frame, kept.T @ centred @ kept, total
