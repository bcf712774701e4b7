"""What patching each part of a run does: by patching where that is cheap, else by gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from methods_multimodal.core.record import Record
from methods_multimodal.cross_attention.attribution import TRUSTED, attribute_patching
from methods_multimodal.cross_attention.cases import Case, Part
from methods_multimodal.cross_attention.metrics import Metric
from methods_multimodal.cross_attention.tracing import patch_words
from mm_adapters import InputError, Model


@dataclass(frozen=True)
class PartEffects(Record):
    """The change of the metric by each part, and by everything at once.

    `method` is "exact" or "integrated". `completeness` is what the estimates of all parts of the run add up
    to by the whole effect; NaN of exact effects, which need not add up to it.
    """

    effects: Float[Tensor, "part case"]
    whole: Float[Tensor, " case"]
    layers: tuple[tuple[int, ...], ...]
    heads: tuple[tuple[int, ...], ...]
    steps: tuple[tuple[int, ...], ...]
    method: str
    completeness: float

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts, in the order of `effects`."""
        every = zip(self.layers, self.heads, self.steps, strict=True)
        return tuple(Part(a or None, b or None, c or None) for a, b, c in every)

    @property
    def sizes_are_trusted(self) -> bool:
        """Whether the sizes count; where the sum is off by over 30 %, only the order does."""
        return self.method == "exact" or abs(self.completeness - 1) <= TRUSTED

    def shares(self) -> Float[Tensor, " part"]:
        """Each part's effect as a share of the whole one, over cases.

        Raises: InputError if the sizes are not to be trusted.
        """
        if not self.sizes_are_trusted:
            raise InputError(
                f"The estimates add up to {self.completeness:.0%} of the whole effect: they rank the parts, "
                "and their sizes say nothing. Patch the best of them (patch_words), or take more points."
            )
        return self.effects.mean(1) / self.whole.mean()

    def order(self) -> list[int]:
        """The numbers of the parts, from the largest effect on, in the direction of the whole one."""
        signed = self.effects.mean(1) * torch.sign(self.whole.mean())
        return torch.argsort(signed, descending=True, stable=True).tolist()


def effects_of_parts(
    model: Model,
    cases: Sequence[Case],
    metric: Metric,
    parts: Sequence[Part],
    *,
    exact_up_to: int = 40,
    positions: str = "after",
    points: int = 10,
    batch: int = 16,
    options: Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
) -> PartEffects:
    """Patches each part (`patch_words`) if there are few, else estimates them (`attribute_patching`).

    A gradient costs about as much as three pictures, so ten points of a path cost as much as patching thirty
    to forty parts, and patching is right. Over a sampling loop the estimates can be poor: `completeness` says
    how far what they add up to is off.

    Args:
        model: What draws.
        cases: Prompts, each with another one.
        metric: Takes pictures, gives a number each.
        parts: The pieces of a run.
        exact_up_to: How many parts are patched at most.
        positions: Where a word is read, as in `patch_words`.
        points: How many midpoints the estimates take.
        batch: Rows of a run of patching.
        options: The pipeline's.
        folder: Where work is written down as it is done; a call that was killed goes on there.

    Source: as `patch_words` and `attribute_patching`.
    Raises: as those.
    """
    named: dict[str, Any] = {
        "layers": tuple(part.layers or () for part in parts),
        "heads": tuple(part.heads or () for part in parts),
        "steps": tuple(part.steps or () for part in parts),
    }
    shared: dict[str, Any] = {"positions": positions, "options": options, "folder": folder}
    if len(parts) <= exact_up_to:
        exact = patch_words(model, cases, metric, parts, batch=batch, **shared)
        return PartEffects(
            effects=exact.changed - exact.base,
            whole=exact.goal - exact.base,
            **named,
            method="exact",
            completeness=float("nan"),
        )
    fast = attribute_patching(model, cases, metric, points=points, **shared)
    return PartEffects(
        effects=fast.of(parts),
        whole=fast.whole - fast.base,
        **named,
        method="integrated",
        completeness=fast.completeness,
    )
