"""Which units stand for what, from activations on labelled inputs: selective, dead, multimodal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from methods_multimodal.core.record import Record
from methods_multimodal.core.statistics import auroc
from mm_adapters import InputError


@dataclass(frozen=True)
class Selectivity(Record):
    """How much each unit prefers one class of inputs.

    `index[unit]` is (mean on its best class - mean on the others) / (the sum of the two sizes), in
    [-1, 1]; `preferred[unit]` that class; `dead[unit]` whether it never exceeds the floor.
    """

    index: Float[Tensor, " unit"]
    preferred: tuple[str, ...]
    dead: Bool[Tensor, " unit"]


def selectivity(
    activations: Float[Tensor, "input unit"], classes: Sequence[str], *, floor: float = 0.0
) -> Selectivity:
    """The class-selectivity index of every unit.

    `classes` names each input's class: a shape, a domain (photo, drawing), a modality (image, text).

    Source: Morcos et al. 2018, arXiv 1803.06959, with sizes in place of means in the denominator, so
    that units with negative values have an index too.
    """
    if len(classes) != len(activations):
        raise InputError(f"{len(activations)} inputs have {len(classes)} classes.")
    known = list(dict.fromkeys(classes))
    if len(known) < 2:
        raise InputError(f"Selectivity compares classes; all inputs are {known}.")
    values = activations.float()
    members = torch.tensor([known.index(c) for c in classes])
    means = torch.stack([values[members == k].mean(0) for k in range(len(known))])
    best = means.argmax(0)
    top = means.gather(0, best[None])[0]
    others = (means.sum(0) - top) / (len(known) - 1)
    index = (top - others) / (top.abs() + others.abs()).clamp_min(1e-12)
    return Selectivity(index, tuple(known[k] for k in best.tolist()), (values <= floor).all(0))


@dataclass(frozen=True)
class Multimodal(Record):
    """Units that follow a concept in pictures and in words alike.

    `images` and `texts` are each unit's AUROC for each concept in the two; `score` the smaller of the
    two, in [0, 1].
    """

    images: Float[Tensor, "unit concept"]
    texts: Float[Tensor, "unit concept"]
    names: tuple[str, ...]

    @property
    def score(self) -> Float[Tensor, "unit concept"]:
        return torch.minimum(self.images, self.texts)

    def pairs(self, min_score: float = 0.9) -> list[tuple[int, str, float]]:
        """(unit, concept, score) of the pairs whose score is above `min_score`, the best first."""
        rows = [
            (unit, self.names[c], float(self.score[unit, c]))
            for unit, c in (self.score > min_score).nonzero().tolist()
        ]
        return sorted(rows, key=lambda row: -row[2])


def multimodal_neurons(
    on_images: Float[Tensor, "image unit"],
    shown: Bool[Tensor, "image concept"],
    on_texts: Float[Tensor, "text unit"],
    said: Bool[Tensor, "text concept"],
    names: Sequence[str],
) -> Multimodal:
    """Which units fire for a concept whether it is shown or said.

    The same units (of a language tower, say) on pictures and on texts, and which concepts each has.

    Source: the question of Goh et al. 2021 (Distill, doi 10.23915/distill.00030), answered by AUROC.
    """
    if on_images.shape[1] != on_texts.shape[1]:
        raise InputError(
            f"Pictures have {on_images.shape[1]} units and texts {on_texts.shape[1]}: they are not the same."
        )
    return Multimodal(
        auroc(on_images, shown).nan_to_num(0.5), auroc(on_texts, said).nan_to_num(0.5), tuple(names)
    )


def contribution(
    activations: Float[Tensor, "input unit"],
    output_weights: Float[Tensor, "unit d_model"],
    direction: Float[Tensor, " d_model"],
) -> Float[Tensor, "input unit"]:
    """What each unit adds along a direction of the residual stream: activation times its weight there.

    With the unembedding of a word as the direction, units that add to it on pictures are the multimodal
    neurons of Schwettmann et al. 2023, arXiv 2308.01544, and Pan et al. 2023, arXiv 2311.07470.
    """
    return activations * (output_weights @ direction)
