"""What can be measured of pictures: numbers for each image that a trace or an edit is judged by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mm_adapters import InputError

Images = Float[Tensor, "image 3 height width"]
Metric = Callable[[Tensor], Tensor]


def clip_score(model: Any, text: str | Sequence[str]) -> Metric:
    """The cosine between pictures (0..1) and a text, by any contrastive model of this package.

    One text is for all pictures; a list has one for each. The pictures go in as pixels, so that
    gradients flow.
    """
    with torch.no_grad():
        wanted = F.normalize(
            model.embed(text=[text] if isinstance(text, str) else list(text)).float(), dim=-1
        )
    inputs = model.inputs
    mean, std, size = _normalisation(inputs)

    def score(images: Images) -> Float[Tensor, " image"]:
        pixels = F.interpolate(images.float(), size=size, mode="bicubic", antialias=True, align_corners=False)
        pixels = (pixels - mean.to(pixels)) / std.to(pixels)
        takes = (
            model.sitemap.model_record.towers["vision"].takes or model.sitemap.towers["vision"].record.takes
        )
        given = {takes: pixels.to(model.device, model.dtype)}
        embedded = model.vision(given.pop(takes), return_type="embeds")
        return (F.normalize(embedded.float(), dim=-1) * wanted.to(embedded.device)).sum(-1)

    return score


def clip_contrast(model: Any, word: str, other: str) -> Metric:
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
    wanted = torch.tensor(list(rgb), dtype=torch.float32)

    def score(images: Images) -> Float[Tensor, " image"]:
        apart = (images.float() - wanted.to(images.device)[:, None, None]).square().sum(1).flatten(1)
        n = max(1, apart.shape[1] // 10)
        return -apart.topk(n, largest=False).values.mean(1).sqrt()

    return score


def scores(metric: Metric, images: Images) -> Float[Tensor, " image"]:
    """The metric of each picture. Raises: InputError if it does not give one number for each."""
    with torch.no_grad():
        found = metric(images)
    if not isinstance(found, Tensor) or found.shape != (len(images),):
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InputError(f"The metric gave {got} for {len(images)} pictures; it gives one number for each.")
    if not bool(found.isfinite().all()):
        bad = (~found.isfinite()).nonzero().flatten().tolist()
        raise InputError(f"The metric is not a number for the pictures {bad}: did a step break down?")
    return found.float()


def _normalisation(inputs: Any) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """The mean, spread and size that a contrastive model's own preparation of a picture has.

    Found by preparing pictures: black and white tell the two numbers, the shape the size.
    """
    if inputs is None:
        raise InputError("This model has no processor. Load it by name, or wrap it with processor=....")
    from PIL import Image

    plain = [Image.new("RGB", (64, 64), (v, v, v)) for v in (0, 255)]
    ready = next(v for v in inputs.prepare(images=plain).values() if isinstance(v, Tensor) and v.ndim == 4)
    black, white = ready.float().mean((-1, -2))
    std = 1 / (white - black)
    return (-black * std)[:, None, None], std[:, None, None], (ready.shape[-2], ready.shape[-1])
