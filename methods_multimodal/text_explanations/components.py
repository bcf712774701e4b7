"""Which components of a vision tower carry a property that is described in words."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from methods_multimodal.core.generators import Seed, generator
from methods_multimodal.core.record import Record
from methods_multimodal.text_explanations.ablation import Component, components_of, outputs
from methods_multimodal.text_explanations.decomposition import Decomposition
from mm_adapters import InputError


@dataclass(frozen=True)
class Ranking(Record):
    """Components by how much of a property's variation they account for, most first.

    `scores` are correlations, averaged over the property's directions, of a component's projection
    with the whole embedding's.
    """

    layers: tuple[int, ...]
    heads: tuple[int | None, ...]
    scores: Float[Tensor, " component"]

    def components(self, n: int | None = None) -> list[Component]:
        """The first `n` components."""
        pairs = list(zip(self.layers, self.heads, strict=True))
        return [Component(layer, head) for layer, head in pairs[:n]]


@dataclass(frozen=True)
class Alignment(Record):
    """A linear map for each component of one model into the joint space of another."""

    maps: Float[Tensor, "component width joint"]
    bias: Float[Tensor, " joint"]
    cosine: float

    def __call__(self, decomposed: Decomposition) -> Float[Tensor, "image component joint"]:
        """Every component's output, in the joint space."""
        return einsum(stacked(decomposed), self.maps, "n c w, c w j -> n c j")


def stacked(decomposed: Decomposition) -> Float[Tensor, "image component width"]:
    """The outputs of all components, in the order of `components_of`."""
    return torch.stack([outputs(decomposed, c) for c in components_of(decomposed)], 1)


def rank_components(
    decomposed: Decomposition,
    texts: Float[Tensor, "text joint"],
    *,
    alignment: Alignment | None = None,
) -> Ranking:
    """Ranks components by a property that texts describe.

    The texts' directions are made orthonormal; along each, a component's projections over images are
    correlated with those of the sum of all, and weighted by the share of variance they have: of two
    components that vary alike, the one that varies more comes first. `alignment` takes a model that
    shares no space with the texts into one that does.

    Source: Balasubramanian et al. 2024, arXiv 2406.01583, section 4 (COMPALIGN and its scoring).
    Raises: InputError if widths do not fit or there are more texts than directions.
    """
    parts = stacked(decomposed) if alignment is None else alignment(decomposed)
    if texts.shape[1] != parts.shape[2]:
        raise InputError(
            f"Texts are {texts.shape[1]} wide and components {parts.shape[2]}; align the components first."
        )
    if len(texts) > parts.shape[2]:
        raise InputError(f"A property is at most {parts.shape[2]} texts here; {len(texts)} were given.")
    axes = torch.linalg.qr((texts - texts.mean(0) if len(texts) > 1 else texts).T.double()).Q
    axes = axes[:, : max(1, len(texts) - 1)].to(parts)  # Centred texts span one direction fewer.
    along = parts @ axes
    along = along - along.mean(0)
    whole = along.sum(1)
    covariance = einsum(along, whole, "n c k, n k -> c k") / len(along)
    scores = (covariance / whole.square().mean(0).clamp_min(1e-30)).mean(1)
    order = scores.argsort(descending=True)
    which = components_of(decomposed)
    return Ranking(
        layers=tuple(which[i].layer for i in order.tolist()),
        heads=tuple(which[i].head for i in order.tolist()),
        scores=scores[order].float().cpu(),
    )


def align(
    decomposed: Decomposition,
    joint: Float[Tensor, "image joint"],
    *,
    orthogonal: float = 0.01,
    epochs: int = 300,
    learning_rate: float = 3e-3,
    seed: Seed = 0,
) -> Alignment:
    """Learns one linear map a component, so that the mapped components sum to another model's embeddings.

    `joint` are a CLIP's embeddings of the same images. Minimises one minus the cosine of the sum and the
    embedding, plus `orthogonal` times how far each map is from keeping lengths and angles.

    Source: Balasubramanian et al. 2024, arXiv 2406.01583, section 3 (COMPALIGN).
    """
    if len(joint) != len(decomposed.own):
        raise InputError(f"{len(decomposed.own)} images were decomposed and {len(joint)} embeddings given.")
    parts = stacked(decomposed).float()
    scale = parts.std().clamp_min(1e-12)
    targets = torch.nn.functional.normalize(joint.float(), dim=1)
    width, wide = parts.shape[2], joint.shape[1]
    start = torch.randn(parts.shape[1], width, wide, generator=generator(seed)).to(parts) / width**0.5
    maps, bias = torch.nn.Parameter(start), torch.nn.Parameter(targets.mean(0).clone())
    optimiser = torch.optim.Adam([maps, bias], lr=learning_rate)
    rank = min(width, wide)
    loss = torch.zeros(())
    with torch.enable_grad():
        for _ in range(epochs):
            summed = einsum(parts / scale, maps, "n c w, c w j -> n j") + bias
            loss = 1 - torch.nn.functional.cosine_similarity(summed, targets).mean()
            small = maps.mT @ maps if wide <= width else maps @ maps.mT
            off = (small - torch.eye(rank).to(small)).square().mean()
            optimiser.zero_grad()
            (loss + orthogonal * off).backward()
            optimiser.step()
    return Alignment((maps / scale).detach(), bias.detach(), 1 - float(loss.detach()))
