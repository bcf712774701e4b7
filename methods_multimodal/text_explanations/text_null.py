"""How much of a head's variance a vocabulary would explain whose directions mean nothing."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor

from methods_multimodal.core.generators import Seed, generator
from methods_multimodal.text_explanations.moments import Moments
from methods_multimodal.text_explanations.text_span import NothingVariesError, leading


def rotated_shares(
    heads: Moments, texts: Float[Tensor, "text width"], rank: int = 80, *, n: int = 99, seed: Seed = 0
) -> Float[Tensor, "draw ..."]:
    """The share of each head's variance along the first text of a vocabulary rotated at random, n times.

    The rotation is of the whole joint space (uniform over all), so the texts keep their number, their
    lengths and the angles between them, and lose what they point at. The first text is chosen as
    `text_span` chooses it. NaN for a head whose output does not vary.

    Args:
        heads: The moments of one head, or of several with leading axes.
        texts: The texts' vectors.
        rank: How many leading directions of a head's output the texts are projected on.
        n: How many rotations are drawn.
        seed: What they are drawn with.
    """
    shape = heads.total.shape[:-1]
    each = [heads[index] for index in product(*map(range, shape))]
    frames = [_frame(one, rank) for one in each]
    shares = torch.full((n, len(each)), torch.nan)
    for draw, rotated in enumerate(_rotations(texts, n, seed)):
        for i, frame in enumerate(frames):
            if frame is not None:
                shares[draw, i] = _first_share(rotated.to(frame[0]) @ frame[0].T, *frame[1:])
    return shares.reshape(n, *shape)


def _frame(moments: Moments, rank: int) -> tuple[Tensor, Tensor, Tensor] | None:
    try:
        frame, covariance, total = leading(moments, rank)
    except NothingVariesError:
        return None
    return frame.float(), covariance.float(), total.float()


def _first_share(
    coordinates: Float[Tensor, "text rank"], covariance: Float[Tensor, "rank rank"], total: Tensor
) -> Tensor:
    along = ((coordinates @ covariance) * coordinates).sum(-1)
    best = along.argmax()
    return along[best] / coordinates[best].square().sum() / total


def _rotations(texts: Tensor, n: int, seed: Seed) -> Iterator[Float[Tensor, "text width"]]:
    rng, width = generator(seed), texts.shape[1]
    for _ in range(n):
        # QR of Gaussian numbers is uniform once the diagonal is positive (Mezzadri 2007, math-ph/0609050).
        q, r = torch.linalg.qr(torch.randn(width, width, generator=rng))
        yield texts.float() @ (q * r.diagonal().sign()).to(texts)
