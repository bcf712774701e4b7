"""Which latent stands for which concept, where the truth about every image is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mm_adapters import InputError


@dataclass(frozen=True)
class ConceptMatch:
    """For each concept the latent that detects it best, chosen on some images and measured on others.

    `f1` of "is active above `threshold`" against the truth; `chance` is the same search with the truth's
    rows shuffled: what the best of so many latents reaches by luck.
    """

    concepts: tuple[str, ...]
    latent: tuple[int, ...]
    threshold: tuple[float, ...]
    f1: tuple[float, ...]
    chance: tuple[float, ...]

    def share(self, at_least: float = 0.9) -> float:
        """The share of concepts detected with this F1."""
        return sum(f >= at_least for f in self.f1) / len(self.f1)

    def __str__(self) -> str:
        rows = zip(self.concepts, self.latent, self.f1, self.chance, strict=True)
        lines = [f"{c:<28} latent {i:>6}  F1 {f:.3f}  by chance {b:.3f}" for c, i, f, b in rows]
        return "\n".join(lines)


def match_concepts(
    acts: Float[Tensor, "image latent"],
    truth: Bool[Tensor, "image concept"],
    concepts: Sequence[str],
    *,
    choose_on: Bool[Tensor, " image"] | None = None,
    n_thresholds: int = 24,
    seed: int = 0,
) -> ConceptMatch:
    """The best latent of each concept, by F1 on images it was not chosen on.

    `choose_on` says on which images latents and thresholds are chosen (None: on a random half); F1 is
    of the rest. Latents are compared at `n_thresholds` quantiles of their positive activations.

    Raises: InputError if a concept is true of all images, or of none, of either part.
    """
    generator = torch.Generator().manual_seed(seed)
    if choose_on is None:
        choose_on = torch.zeros(len(acts), dtype=torch.bool)
        choose_on[torch.randperm(len(acts), generator=generator)[: len(acts) // 2]] = True
    chosen_on, measured_on = choose_on.nonzero()[:, 0], (~choose_on).nonzero()[:, 0]
    for part in (chosen_on, measured_on):
        bad = [c for c, n in zip(concepts, truth[part].sum(0).tolist(), strict=True) if n in (0, len(part))]
        if bad:
            raise InputError(f"{', '.join(bad)}: true of all or of no image of a part; give more images.")
    latent, threshold = _best(acts[chosen_on], truth[chosen_on], n_thresholds)
    f1 = _f1_of(acts[measured_on], truth[measured_on], latent, threshold)
    shuffled = truth[torch.randperm(len(truth), generator=generator)]
    chance_latent, chance_threshold = _best(acts[chosen_on], shuffled[chosen_on], n_thresholds)
    chance = _f1_of(acts[measured_on], shuffled[measured_on], chance_latent, chance_threshold)
    return ConceptMatch(
        tuple(concepts),
        tuple(latent.tolist()),
        tuple(threshold.tolist()),
        tuple(f1.tolist()),
        tuple(chance.tolist()),
    )


def _best(acts: Tensor, truth: Tensor, n_thresholds: int) -> tuple[Tensor, Tensor]:
    """For each concept the latent and the threshold with the highest F1."""
    is_true = truth.float()
    best = torch.full((truth.shape[1],), -1.0)
    latent = torch.zeros(truth.shape[1], dtype=torch.int64)
    threshold = torch.zeros(truth.shape[1])
    # Quantiles of what is positive: a latent that is rarely active is not judged by zeros.
    positive = torch.where(acts > 0, acts, torch.nan)
    for level in torch.linspace(0, 0.95, n_thresholds).tolist():
        bounds = torch.nanquantile(positive, level, dim=0).nan_to_num(torch.inf)
        bounds = torch.where(bounds.isfinite(), bounds, torch.inf)
        if level == 0:
            bounds = torch.where(bounds.isfinite(), 0.0, bounds)
        is_active = (acts > bounds).float()
        both = is_active.T @ is_true
        f1 = 2 * both / (is_active.sum(0)[:, None] + is_true.sum(0)).clamp_min(1)
        top, which = f1.max(0)
        better = top > best
        best = torch.where(better, top, best)
        latent = torch.where(better, which, latent)
        threshold = torch.where(better, bounds[which], threshold)
    return latent, threshold


def _f1_of(acts: Tensor, truth: Tensor, latent: Tensor, threshold: Tensor) -> Tensor:
    is_active = (acts[:, latent] > threshold).float()
    is_true = truth.float()
    return 2 * (is_active * is_true).sum(0) / (is_active.sum(0) + is_true.sum(0)).clamp_min(1)
