"""A classifier freed of a shortcut: the heads that carry it are found by name and held at their mean."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from methods_multimodal.core.record import Record
from methods_multimodal.text_explanations.ablation import Component, ablate, components_of
from methods_multimodal.text_explanations.components import rank_components
from methods_multimodal.text_explanations.decomposition import Decomposition
from mm_adapters import InputError


@dataclass(frozen=True)
class Groups(Record):
    """Accuracy by group: `values` [group], with the groups' numbers of images."""

    values: Float[Tensor, " group"]
    sizes: Int[Tensor, " group"]
    average: float

    @property
    def worst(self) -> float:
        """The lowest accuracy of any group that has images."""
        return float(self.values[self.sizes > 0].min())


@dataclass(frozen=True)
class Repair(Record):
    """Which components were ablated, in the order they were taken, and what it cost on the images it
    was chosen on: `agreement` is how often the class said stays the same."""

    layers: tuple[int, ...]
    heads: tuple[int | None, ...]
    scores: Float[Tensor, " component"]

    @property
    def components(self) -> list[Component]:
        """The components to ablate."""
        return [Component(layer, head) for layer, head in zip(self.layers, self.heads, strict=True)]


def find_shortcut(
    decomposed: Decomposition,
    spurious: Float[Tensor, "text width"],
    core: Float[Tensor, "other width"],
    *,
    n: int | None = None,
    heads_only: bool = False,
) -> Repair:
    """The components to ablate: those that carry what should not matter more than what should.

    Both properties are given as texts; no label of any image is looked at. Components are ranked by the
    spurious property's score less the core one's. Without `n`, those are taken whose spurious score is
    above a share of one over the number of components and above their core score.

    Source: Gandelsman et al. 2024, arXiv 2310.05916, section 5.1; Balasubramanian et al. 2024,
    arXiv 2406.01583, section 6 (difference of scores).
    """
    by_name: dict[Component, float] = {}
    for texts, sign in ((spurious, 1.0), (core, -1.0)):
        ranking = rank_components(decomposed, texts)
        for component, score in zip(ranking.components(), ranking.scores.tolist(), strict=True):
            by_name[component] = by_name.get(component, 0.0) + sign * score
    able = [c for c in components_of(decomposed) if c.head is not None or not heads_only]
    able.sort(key=lambda c: -by_name[c])
    chosen = able[:n] if n is not None else [c for c in able if by_name[c] > 1 / len(by_name)]
    return Repair(
        layers=tuple(c.layer for c in chosen),
        heads=tuple(c.head for c in chosen),
        scores=torch.tensor([by_name[c] for c in chosen]),
    )


def group_accuracy(
    embeddings: Float[Tensor, "image width"],
    classes: Float[Tensor, "label width"],
    labels: Int[Tensor, " image"],
    groups: Int[Tensor, " image"],
    bias: Float[Tensor, " label"] | None = None,
) -> Groups:
    """Accuracy in each group of images, and on all."""
    if not len(embeddings) == len(labels) == len(groups):
        raise InputError(f"{len(embeddings)} embeddings, {len(labels)} labels, {len(groups)} groups.")
    logits = embeddings @ classes.to(embeddings).T
    logits = logits if bias is None else logits + bias.to(logits)
    right = (logits.argmax(1) == labels.to(logits.device)).float().cpu()
    sizes = torch.bincount(groups.cpu())
    sums = torch.zeros(len(sizes)).index_add(0, groups.cpu(), right)
    return Groups(sums / sizes.clamp_min(1), sizes, float(right.mean()))


def repaired(decomposed: Decomposition, repair: Repair, means: Decomposition) -> Float[Tensor, "image width"]:
    """The embeddings with the shortcut's components at their mean over other images."""
    return ablate(decomposed, repair.components, "mean", means=means)
