"""What a sampler makes of one prediction: the clean latents that it expects in the end."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor


def input_scale(sampler: Any, time: Any) -> float:
    """What the sampler multiplies latents with before the denoiser is given them."""
    if not hasattr(sampler, "scale_model_input"):
        return 1.0
    return float(_fresh(sampler).scale_model_input(torch.ones(1, device=_device(time)), time))


def takes_variance(sampler: Any) -> bool:
    """Whether the sampler wants the denoiser's variances beside its prediction."""
    return sampler.config.get("variance_type") in ("learned", "learned_range")


def clean_latents(sampler: Any, prediction: Tensor, step: int, latents: Tensor) -> Tensor | None:
    """What the sampler expects the finished latents to be; None for a sampler that does not say.

    `step` counts the sampler's own timesteps.
    """
    device = latents.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # Some samplers draw noise.
        result = _fresh(sampler).step(prediction, sampler.timesteps[step], latents)
    for name in ("pred_original_sample", "denoised"):
        if getattr(result, name, None) is not None:
            return getattr(result, name)
    if _predicts_flow(sampler):
        return latents - sampler.sigmas[step].to(latents) * prediction
    return None


def _predicts_flow(sampler: Any) -> bool:
    """Whether a prediction is the velocity from the picture to the noise."""
    kind = sampler.config.get("prediction_type")
    # Samplers of flows alone have no schedule of noise, and no such setting.
    only_flow = kind is None and hasattr(sampler, "sigmas") and not hasattr(sampler, "alphas_cumprod")
    return kind == "flow_prediction" or only_flow


def _fresh(sampler: Any) -> Any:
    """A copy that finds its step by the time: samplers count their steps in private."""
    one = copy.deepcopy(sampler)
    for counter in ("_step_index", "_begin_index"):
        if hasattr(one, counter):
            setattr(one, counter, None)
    return one


def _device(time: Any) -> Any:
    return time.device if isinstance(time, Tensor) else None
