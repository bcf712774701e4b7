"""What can be measured of pictures: numbers for each image that a trace or an edit is judged by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from methods_multimodal.core.embed import embed_texts
from methods_multimodal.core.model import check_whole_images
from mm_adapters import InputError, Model

Images = Float[Tensor, "image 3 height width"]
Metric = Callable[[Tensor], Tensor]


def clip_score(model: Model, text: str | Sequence[str]) -> Metric:
    """The cosine between pictures (0..1) and a text, by any contrastive model of this package.

    One text is for all pictures; a list has one for each. The pictures go in as pixels, so that
    gradients flow.

    Raises: MissingSiteError if the model sees no images, or cut ones alone.
    """
    vision = model.check_tower("vision")
    check_whole_images(vision)
    texts = embed_texts(model, [text] if isinstance(text, str) else list(text))
    mean, std, size = _normalisation(model)

    def score(images: Images) -> Float[Tensor, " image"]:
        pixels = F.interpolate(images.float(), size=size, mode="bicubic", antialias=True, align_corners=False)
        pixels = (pixels - mean.to(pixels)) / std.to(pixels)
        embedded = vision.embed(**{vision.input_name: pixels.to(model.device, model.dtype)})
        return (F.normalize(embedded.float(), dim=-1) * texts.to(embedded.device)).sum(-1)

    return score


def clip_contrast(model: Model, word: str, other: str) -> Metric:
    """How much nearer pictures are to one text than to another: the difference of two `clip_score`s."""
    here, there = clip_score(model, word), clip_score(model, other)

    def score(images: Images) -> Float[Tensor, " image"]:
        return there(images) - here(images)

    return score


def by_rule(judge: Callable[[Any], bool | float]) -> Metric:
    """A rule on pixels, [height, width, 3] bytes, as a metric of each picture. It has no gradient."""

    def score(images: Images) -> Float[Tensor, " image"]:
        arrays = (images.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return torch.tensor([float(judge(array)) for array in arrays])

    return score


def colour(rgb: Sequence[float]) -> Metric:
    """How near the reddest (bluest, ...) tenth of a picture comes to a colour: minus the distance.

    `rgb` is in 0..1. It has a gradient.
    """
    target = torch.tensor(list(rgb), dtype=torch.float32)

    def score(images: Images) -> Float[Tensor, " image"]:
        apart = (images.float() - target.to(images.device)[:, None, None]).square().sum(1).flatten(1)
        n = max(1, apart.shape[1] // 10)
        return -apart.topk(n, largest=False).values.mean(1).sqrt()

    return score


def scores(metric: Metric, images: Images) -> Float[Tensor, " image"]:
    """The metric of each picture. Raises: InputError if it does not give one number for each."""
    with torch.no_grad():
        values = metric(images)
    if not isinstance(values, Tensor) or values.shape != (len(images),):
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise InputError(f"The metric gave {got} for {len(images)} pictures; it gives one number for each.")
    if not bool(values.isfinite().all()):
        bad = (~values.isfinite()).nonzero().flatten().tolist()
        raise InputError(f"The metric is not a number for the pictures {bad}: did a step break down?")
    return values.float()


def _normalisation(model: Model) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """The mean, spread and size with which a contrastive model's processor prepares pictures.

    Measured on a black and a white picture.

    Raises: InputError if the model came without a processor.
    """
    from PIL import Image

    plain = [Image.new("RGB", (64, 64), (v, v, v)) for v in (0, 255)]
    ready = next(v for v in model.prepare(images=plain).values() if isinstance(v, Tensor) and v.ndim == 4)
    black, white = ready.float().cpu().mean((-1, -2))
    std = 1 / (white - black)
    return (-black * std)[:, None, None], std[:, None, None], (ready.shape[-2], ready.shape[-1])
