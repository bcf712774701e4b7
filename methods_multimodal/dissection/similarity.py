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
from scipy.stats import rankdata
from torch import Tensor

from mm_adapters import InputError

Kernel = Callable[..., Float[Tensor, "unit concept"]]

TINY = 1e-7
# Odds are multiplied before a logarithm is taken, as long as the smallest product is a normal float32.
_SMALLEST = 1e-36
# Concepts handled at once: what is gathered for them stays in a core's cache.
_CONCEPTS = 128


def soft_wpmi(
    similarity: Float[Tensor, "image concept"],
    activations: Float[Tensor, "image unit"],
    *,
    top_k: int = 100,
    scale: float = 10.0,
    prior: float = 1.0,
    p_first: float = 0.998,
    p_last: float = 0.97,
) -> Float[Tensor, "unit concept"]:
    """Soft weighted pointwise mutual information: are the unit's top images likely under the concept?

    An image counts as one of the unit's with a probability that falls from `p_first` at the strongest
    towards `p_last`. The prior of a concept is its mean likelihood over the units given.
    """
    top = top_images(activations, top_k)
    total = torch.zeros(len(top), similarity.shape[1])
    accumulate_soft_likelihood(
        total, torch.softmax(similarity.float() * scale, 1), top, p_first=p_first, p_last=p_last
    )
    return subtract_prior(
        total, prior, uninformative_score(total.shape[1], top_k, p_first=p_first, p_last=p_last)
    )


def wpmi(
    similarity: Float[Tensor, "image concept"],
    activations: Float[Tensor, "image unit"],
    *,
    top_k: int = 28,
    scale: float = 2.0,
    prior: float = 0.6,
) -> Float[Tensor, "unit concept"]:
    """Weighted pointwise mutual information with the unit's `top_k` images, all counted alike."""
    top = top_images(activations, top_k)
    total = torch.zeros(len(top), similarity.shape[1])
    accumulate_log_likelihood(total, torch.softmax(similarity.float() * scale, 1), top)
    return subtract_prior(total, prior)


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
        activation = values[:, unit]
        likeness = similarity[top[:, unit]].float()
        order = rankdata(-likeness.cpu().numpy(), method="ordinal", axis=0) - 1
        ranks = torch.from_numpy(order).to(activation.device)
        change = (activation[:, None] - activation[ranks]).abs().pow(power).mean(0)
        random = (activation[:, None] - activation[None, :]).abs().pow(power).mean().clamp_min(TINY)
        out[unit] = -(change / random) / likeness.mean(0).clamp_min(TINY).pow(scale)
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
def accumulate_soft_likelihood(
    total: Float[Tensor, "unit concept"],
    likely: Float[Tensor, "image concept"],
    top: Int[Tensor, "unit top"],
    first: int = 0,
    *,
    p_first: float = 0.998,
    p_last: float = 0.97,
) -> None:
    """Adds log(1 + p (likely - 1) + TINY) of every unit's top images, p falling with the rank, to `total`.

    Only of those of its images that are here: `likely` is about the images from number `first` on. Each
    term is less that of an image of which all concepts are equally likely (`uninformative_score` is their
    sum): what is left is small, and float32 holds it. With d = (1 - p + TINY) / p a term is
    log p + log(d + likely); the sums are multiplied before their log.
    """
    n_units, n_top = top.shape
    odds = _odds(n_top, p_first, p_last)[1]
    # A unit's terms have ranks of their own, so the smallest product is that of the smallest odds.
    at_once = max(1, int((odds.sort().values.cumprod(0) > _SMALLEST).sum()))
    usual = (odds + 1 / likely.shape[1]).log()
    units, ranks = ((top >= first) & (top < first + len(likely))).nonzero(as_tuple=True)
    if not len(units):
        return
    images = top[units, ranks] - first
    counts = units.bincount(minlength=n_units)
    starts = counts.cumsum(0) - counts
    # Units with most images first: the n-th images of all that have so many are then one gather.
    order = counts.argsort(descending=True, stable=True)
    groups = []
    for start in range(0, int(counts.max()), at_once):
        group, less = [], torch.zeros(n_units, dtype=torch.float64)
        for nth in range(start, min(start + at_once, int(counts.max()))):
            which = order[: int((counts > nth).sum())]
            at = starts[which] + nth
            group.append((images[at], odds.float()[ranks[at]].unsqueeze(1)))
            less[: len(which)] += usual[ranks[at]]
        groups.append((group, (-less[: len(group[0][0])]).exp().float().unsqueeze(1)))
    back = order.argsort()
    # Memory that is asked for once: fresh pages would cost as much as what is done in them.
    held = likely.new_empty(3 * n_units + len(likely), _CONCEPTS)
    for some, into in zip(likely.split(_CONCEPTS, 1), total.split(_CONCEPTS, 1), strict=True):
        width = some.shape[1]
        space = held.view(-1)[: len(held) * width].view(-1, width)
        logs, term, product, here = space.split([n_units] * 3 + [len(likely)])
        logs.zero_()
        here.copy_(some)
        for group, over_usual in groups:
            for nth, (which, odd) in enumerate(group):
                out = (term if nth else product)[: len(which)]
                torch.index_select(here, 0, which, out=out).add_(odd)
                if nth:
                    product[: len(which)].mul_(out)
            n = len(over_usual)
            logs[:n].add_(product[:n].mul_(over_usual).log_())
        into.add_(torch.index_select(logs, 0, back, out=term))


def uninformative_score(n_concepts: int, n_top: int, p_first: float = 0.998, p_last: float = 0.97) -> float:
    """The soft likelihood of top images that tell nothing: every concept is equally likely."""
    p, odds = _odds(n_top, p_first, p_last)
    return float((p.log() + (odds + 1 / n_concepts).log()).sum())


def _odds(n_top: int, p_first: float, p_last: float) -> tuple[Tensor, Tensor]:
    p = p_first - torch.arange(n_top, dtype=torch.float64) / n_top * (p_first - p_last)
    return p, (1 - p + TINY) / p


@torch.no_grad()
def accumulate_log_likelihood(
    total: Float[Tensor, "unit concept"],
    likely: Float[Tensor, "image concept"],
    top: Int[Tensor, "unit top"],
    first: int = 0,
) -> None:
    """Adds log(likely + TINY) of every unit's top images to `total`, of those that are here."""
    here = (top >= first) & (top < first + len(likely))
    images, starts = top[here] - first, here.sum(1).cumsum(0) - here.sum(1)
    if len(images):
        logs = (likely + TINY).log_()
        total += torch.nn.functional.embedding_bag(images, logs, starts, mode="sum")


def subtract_prior(
    scores: Float[Tensor, "unit concept"], prior: float, offset: float = 0.0
) -> Float[Tensor, "unit concept"]:
    """Takes `prior` times a concept's mean over all units off the scores, in place.

    `offset` is what has been taken off every score before.
    """
    for some in scores.split(_CONCEPTS, 1):
        mean = some.logsumexp(0) - math.log(len(some))
        some.sub_(mean, alpha=prior).add_((1 - prior) * offset)
    return scores


def _centred(values: Float[Tensor, "image n"], power: int) -> Float[Tensor, "image n"]:
    """Centred over the images, to a power, and of unit length (or less, if next to nothing)."""
    values = (values.float() - values.float().mean(0)) ** power
    return values / values.norm(dim=0).clamp_min(1e-3 if power == 3 else 1e-12)
