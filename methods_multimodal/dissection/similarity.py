"""How well a concept's similarity to the images agrees with a unit's activation on them.

Each kernel takes `similarity [image, concept]`, the cosine of each image with each concept's text, and
`activations [image, unit]`, and gives `[unit, concept]`, larger for a better name.

Source: Oikarinen & Weng 2023, arXiv 2204.10965, section 3.2 and appendix A.1; the constants are those of
the published code.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mm_adapters import InputError

Kernel = Callable[..., Float[Tensor, "unit concept"]]

TINY = 1e-7
# So many odds are multiplied before a logarithm is taken: (1 - 0.998) ** 10 is far from float32's end.
_GROUP = 10
# Concepts handled at once: what is gathered for them stays in a core's cache.
_CONCEPTS = 64


def soft_wpmi(
    similarity: Float[Tensor, "image concept"],
    activations: Float[Tensor, "image unit"] | Int[Tensor, "unit top"],
    *,
    top_k: int = 100,
    scale: float = 10.0,
    prior: float = 1.0,
    p_first: float = 0.998,
    p_last: float = 0.97,
    normaliser: Float[Tensor, " image"] | None = None,
) -> Float[Tensor, "unit concept"]:
    """Soft weighted pointwise mutual information: are the unit's top images likely under the concept?

    An image counts as one of the unit's with a probability that falls from `p_first` at the strongest
    towards `p_last`. The prior of a concept is its mean likelihood over the units given.
    `normaliser` is log sum exp of `scale * similarity` over all concepts, if these are only some. In
    place of the activations, what `top_images` gives for them will do.
    """
    top = activations if not activations.is_floating_point() else top_images(activations, top_k)
    if normaliser is None:
        normaliser = (scale * similarity.float()).logsumexp(1)
    parts = []
    for some in similarity.split(_CONCEPTS, 1):
        likely = torch.sub(some.float() * scale, normaliser[:, None]).exp_()
        parts.append(_log_odds(likely, top, p_first, p_last))
    return _less_prior(torch.cat(parts, 1), prior)


def wpmi(
    similarity: Float[Tensor, "image concept"],
    activations: Float[Tensor, "image unit"] | Int[Tensor, "unit top"],
    *,
    top_k: int = 28,
    scale: float = 2.0,
    prior: float = 0.6,
    normaliser: Float[Tensor, " image"] | None = None,
) -> Float[Tensor, "unit concept"]:
    """Weighted pointwise mutual information with the unit's `top_k` images, all counted alike."""
    top = activations if not activations.is_floating_point() else top_images(activations, top_k)
    if normaliser is None:
        normaliser = (scale * similarity.float()).logsumexp(1)
    logs = ((scale * similarity.float() - normaliser[:, None]).exp_() + TINY).log_()
    summed = torch.nn.functional.embedding_bag(top, logs, mode="sum")
    return _less_prior(summed, prior)


def cosine(
    similarity: Float[Tensor, "image concept"], activations: Float[Tensor, "image unit"]
) -> Float[Tensor, "unit concept"]:
    """The cosine of the two, each centred over the images: their correlation."""
    return _centred(activations, 1).T @ _centred(similarity, 1)


def cosine_cubed(
    similarity: Float[Tensor, "image concept"], activations: Float[Tensor, "image unit"]
) -> Float[Tensor, "unit concept"]:
    """The cosine of the cubes of the two, each centred: the strongest images decide."""
    return _centred(activations, 3).T @ _centred(similarity, 3)


def rank_reorder(
    similarity: Float[Tensor, "image concept"],
    activations: Float[Tensor, "image unit"],
    *,
    top_share: float = 0.05,
    power: float = 3.0,
    scale: float = 0.5,
) -> Float[Tensor, "unit concept"]:
    """How little a unit's activations change when its top images are put into the concept's order.

    The change is the mean of |difference| ** `power`, divided by what a random order gives (its
    exact mean over all orders, where the published code draws five) and by the concept's mean
    similarity on those images to the power `scale`. Negative, so that larger is better.
    """
    n_top = int(len(activations) * top_share)
    if n_top < 2:
        raise InputError(
            f"rank_reorder compares the top {top_share:.0%} of the images; of {len(activations)} that is "
            f"{n_top}. Give more images, or a larger top_share."
        )
    values, top = activations.float().topk(n_top, 0)
    out = activations.new_empty(activations.shape[1], similarity.shape[1], dtype=torch.float32)
    for unit in range(activations.shape[1]):
        own = values[:, unit]
        seen = similarity[top[:, unit]].float()
        ranks = seen.argsort(dim=0, descending=True, stable=True).argsort(dim=0)
        change = (own[:, None] - own[ranks]).abs().pow(power).mean(0)
        random = (own[:, None] - own[None, :]).abs().pow(power).mean().clamp_min(TINY)
        out[unit] = -(change / random) / seen.mean(0).clamp_min(TINY).pow(scale)
    return out


KERNELS: dict[str, Kernel] = {
    "soft_wpmi": soft_wpmi,
    "wpmi": wpmi,
    "rank_reorder": rank_reorder,
    "cosine": cosine,
    "cosine_cubed": cosine_cubed,
}


def top_images(activations: Float[Tensor, "image unit"], top_k: int) -> Int[Tensor, "unit top"]:
    """The images on which each unit is strongest, strongest first."""
    if top_k > len(activations):
        raise InputError(
            f"The top {top_k} of {len(activations)} images were asked for. "
            "Give more images, or a smaller top_k."
        )
    return activations.float().topk(top_k, 0).indices.T.contiguous()


@torch.no_grad()
def _log_odds(
    likely: Float[Tensor, "image concept"], top: Int[Tensor, "unit top"], p_first: float, p_last: float
) -> Float[Tensor, "unit concept"]:
    """Sum over a unit's images of log(1 + p (likely - 1) + TINY), p falling with the rank.

    With d = (1 - p + TINY) / p a term is log p + log(d + likely); the sums are multiplied first.
    """
    n_top = top.shape[1]
    p = [p_first - rank / n_top * (p_first - p_last) for rank in range(n_top)]
    total = likely.new_full((top.shape[0], likely.shape[1]), sum(map(math.log, p)), dtype=torch.float64)
    ranked = top.T.contiguous()
    term = likely.new_empty(top.shape[0], likely.shape[1])
    for first in range(0, n_top, _GROUP):
        product = None
        for rank in range(first, min(first + _GROUP, n_top)):
            into = term if product is not None else torch.empty_like(term)
            torch.index_select(likely, 0, ranked[rank], out=into)
            into.add_((1 - p[rank] + TINY) / p[rank])
            product = into if product is None else product.mul_(term)
        assert product is not None
        total += product.log_()
    return total.float()


def _less_prior(scores: Float[Tensor, "unit concept"], prior: float) -> Float[Tensor, "unit concept"]:
    return scores - prior * (scores.logsumexp(0, keepdim=True) - math.log(len(scores)))


def _centred(values: Float[Tensor, "image n"], power: int) -> Float[Tensor, "image n"]:
    """Centred over the images, to a power, and of unit length (or less, if next to nothing)."""
    values = (values.float() - values.float().mean(0)) ** power
    return values / values.norm(dim=0).clamp_min(1e-3 if power == 3 else 1e-12)
