"""Embeddings without some of their components: taken out, held at their mean, or taken from another image."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from methods_multimodal.core.generators import Seed, generator
from methods_multimodal.core.record import Record
from methods_multimodal.text_explanations.decomposition import Decomposition
from mm_adapters import InputError

Mode = Literal["zero", "mean", "resample"]


@dataclass(frozen=True, order=True)
class Component:
    """A head of a layer, the MLP of a layer (no head), or what enters the first block (layer -1)."""

    layer: int
    head: int | None = None

    def __str__(self) -> str:
        if self.head is not None:
            return f"head {self.layer}.{self.head}"
        return "embedding" if self.layer < 0 else f"MLP {self.layer}"


@dataclass(frozen=True)
class Ablation(Record):
    """Accuracy with everything, and without the components named."""

    before: float
    after: float
    components: tuple[str, ...]
    mode: Mode


def components_of(decomposed: Decomposition) -> list[Component]:
    """Every head, then the embedding and every MLP."""
    n_layers, n_heads = decomposed.heads.shape[1], decomposed.heads.shape[3]
    heads = [Component(layer, head) for layer in range(n_layers) for head in range(n_heads)]
    return heads + [Component(layer) for layer in range(-1, n_layers)]


def outputs(decomposed: Decomposition, which: Component) -> Float[Tensor, "image width"]:
    """What one component adds to each embedding, its tokens summed.

    Raises: InputError if there is no such component.
    """
    n_layers, n_heads = decomposed.heads.shape[1], decomposed.heads.shape[3]
    if not -1 <= which.layer < n_layers or (which.head is not None and not 0 <= which.head < n_heads):
        raise InputError(f"There is no {which}: there are {n_layers} layers of {n_heads} heads.")
    if which.head is None:
        return decomposed.mlps[:, 1 + which.layer]
    return decomposed.heads[:, which.layer, :, which.head].sum(1)


def ablate(
    decomposed: Decomposition,
    components: Iterable[Component],
    mode: Mode = "mean",
    *,
    means: Decomposition | None = None,
    seed: Seed = 0,
) -> Float[Tensor, "image width"]:
    """The embeddings with some components' direct effects replaced.

    By nothing ("zero"), by their mean over images ("mean"), or by those of other images, drawn without
    return ("resample"). `means` is where mean or other images are taken from (None: `decomposed` itself).

    Source: Gandelsman et al. 2024, arXiv 2310.05916, section 3 (mean ablation).
    """
    if mode not in ("zero", "mean", "resample"):
        raise InputError(f"There is no ablation {mode!r}; there is zero, mean and resample.")
    source, total = means or decomposed, decomposed.total
    other = None
    if mode == "resample":
        order = torch.randperm(len(source.own), generator=generator(seed))
        other = order.repeat(-(-len(total) // len(order)))[: len(total)].to(total.device)
    for component in components:
        total = total - outputs(decomposed, component)
        if mode == "mean":
            total = total + outputs(source, component).mean(0)
        elif other is not None:
            total = total + outputs(source, component)[other]
    return total


def accuracy(
    embeddings: Float[Tensor, "image width"],
    classes: Float[Tensor, "label width"],
    labels: Int[Tensor, " image"],
) -> float:
    """How often the class whose direction fits best is the right one."""
    return float(
        ((embeddings @ classes.to(embeddings).T).argmax(1) == labels.to(embeddings.device)).float().mean()
    )


def ablation(
    decomposed: Decomposition,
    components: Iterable[Component],
    classes: Float[Tensor, "label width"],
    labels: Int[Tensor, " image"],
    mode: Mode = "mean",
    *,
    means: Decomposition | None = None,
    seed: Seed = 0,
) -> Ablation:
    """Zero-shot accuracy before and after components are ablated."""
    which = list(components)
    after = ablate(decomposed, which, mode, means=means, seed=seed)
    return Ablation(
        accuracy(decomposed.total, classes, labels),
        accuracy(after, classes, labels),
        tuple(map(str, which)),
        mode,
    )
