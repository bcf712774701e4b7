"""What a sampler is given, out of the parts of classifier-free guidance."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mm_adapters import InputError
from mm_adapters.records import Guidance


def combine(guidance: Guidance, parts: Mapping[str, Tensor], numbers: Mapping[str, float]) -> Tensor:
    """The guided prediction, by the record's formula; "cond" alone where that is the only part.

    Raises: InputError if the run does not say by which number it was guided, or was guided by a perturbed
    attention too, whose weight may change from step to step.
    """
    if "perturbed" in parts:
        raise InputError(
            "Perturbed-attention guidance weighs its part by step, so what its sampler was given cannot be "
            "put together from the parts. Run with pag_scale=0."
        )
    cond = parts["cond"]
    if set(parts) == {"cond"}:
        return cond
    uncond = parts["uncond"]
    beside = parts.get("image", uncond)
    scale = _number(numbers, guidance.scale.partition("|")[0]) + guidance.from_zero
    guided = uncond + scale * (cond - beside)
    if "image" in parts:
        guided = guided + _number(numbers, guidance.image_scale) * (beside - uncond)
    if guidance.keeps_norm:
        guided = guided * (cond.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
    share = numbers.get(guidance.rescale or "", 0.0)
    return _rescaled(guided, cond, share) if share else guided


def _rescaled(guided: Tensor, cond: Tensor, share: float) -> Tensor:
    """Each row with its spread drawn towards that of "cond".

    Source: Lin et al. 2023, arXiv 2305.08891, section 3.4.
    """
    axes = list(range(1, cond.ndim))
    spread = cond.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
    return torch.lerp(guided, guided * spread, share)


def _number(numbers: Mapping[str, float], name: str) -> float:
    if name not in numbers:
        raise InputError(f"The run was guided by {name!r}, and does not say by which number.")
    return numbers[name]
