"""Descriptions of units in free words, by any describer, chosen by what the unit itself says of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from methods_multimodal.core.embed import embed_texts
from methods_multimodal.core.outputs import answer_ids
from methods_multimodal.core.record import Record
from methods_multimodal.diffusion.pictures import check_pictures
from mm_adapters import InputError, Model

Picture = Image.Image
Describer = Callable[[Sequence[Picture]], Sequence[str]]
"""Pictures that a unit is strong on, to candidate descriptions of what they have in common."""
Illustrator = Callable[[str], Sequence[Picture]]
"""A description to pictures of it: drawn by a model, or retrieved."""


@dataclass(frozen=True)
class Description(Record):
    """The candidates for one unit, the best first.

    `scores` is how much stronger the unit is on pictures of the candidate than on the probe pictures, in
    standard deviations of the latter.
    """

    unit: int
    candidates: tuple[str, ...]
    scores: Float[Tensor, " candidate"]

    @property
    def text(self) -> str:
        """The best one."""
        return self.candidates[0]


def describe(
    unit: int,
    exemplars: Sequence[Picture],
    describer: Describer,
    illustrate: Illustrator,
    activation: Callable[[Sequence[Picture]], Float[Tensor, "image unit"]],
    baseline: Float[Tensor, "image unit"],
) -> Description:
    """A unit's description: proposed from its exemplars, and tested on the unit.

    `describer` proposes candidates from the exemplars. Each is illustrated, and `activation` runs the
    model on the illustrations; `baseline` are the units' activations on the probe pictures.

    Source: Bai et al. 2024, arXiv 2403.13771 (describe, then dissect); Hernandez et al. 2022, arXiv
    2201.11114, for the exemplars.
    Raises: InputError if nothing is proposed.
    """
    candidates = list(dict.fromkeys(c.strip() for c in describer(exemplars) if c.strip()))
    if not candidates:
        raise InputError(f"The describer proposed nothing for the {len(exemplars)} exemplars of unit {unit}.")
    usual = baseline[:, unit].float()
    scores = []
    for candidate in candidates:
        on_them = activation(list(illustrate(candidate)))[:, unit].float()
        scores.append((on_them.mean() - usual.mean()) / usual.std().clamp_min(1e-12))
    order = torch.stack(scores).argsort(descending=True)
    return Description(unit, tuple(candidates[i] for i in order.tolist()), torch.stack(scores)[order])


def asking(model: Model, question: str, *, n: int = 5, max_new_tokens: int = 8) -> Describer:
    """A describer that asks a vision-language model the same of each exemplar; commonest answers first.

    Raises: MissingSiteError if the model has no language tower.
    """
    model.check_tower("language")
    tokenizer = model.tokenizer_of("language")

    def describer(pictures: Sequence[Picture]) -> list[str]:
        answers = []
        for picture in pictures:
            ready: dict[str, Any] = model.prepare(text=question, images=[picture])
            with torch.no_grad():
                ids = model.wrapped.generate(**ready, max_new_tokens=max_new_tokens, do_sample=False)
            new = answer_ids(ids[0], ready["input_ids"][0])
            answers.append(tokenizer.decode(new, skip_special_tokens=True).strip())
        return [answer for answer, _ in Counter(answers).most_common(n)]

    return describer


def retrieving(
    judge: Model,
    pictures: Sequence[Picture],
    embeddings: Float[Tensor, "image width"],
    *,
    n: int = 10,
    template: str = "{}",
) -> Illustrator:
    """An illustrator that retrieves: the `n` pictures nearest to the text, by a contrastive model.

    Raises: MissingSiteError if the judge has no text tower.
    """
    judge.check_tower("text")

    def illustrate(text: str) -> list[Picture]:
        direction = embed_texts(judge, [template.format(text)]).cpu()[0]
        return [pictures[i] for i in (embeddings @ direction).topk(min(n, len(pictures))).indices.tolist()]

    return illustrate


def drawing(model: Model, *, n: int = 4, template: str = "{}", **options: Any) -> Illustrator:
    """An illustrator that draws: `n` pictures by a text-to-image model, from seeds 0 to n - 1.

    Raises: MissingSiteError if the model makes no pictures, or reads no text.
    """
    model.check_tower("denoiser")
    model.check_tower("text")
    check_pictures(model)

    def illustrate(text: str) -> list[Picture]:
        inputs = {"prompt": [template.format(text)] * n, "seed": list(range(n)), **options}
        return list(model.run(inputs).output.images)

    return illustrate


def mutual_information(
    exemplars: Float[Tensor, "image width"],
    probe: Float[Tensor, "other width"],
    texts: Float[Tensor, "concept width"],
    *,
    weight: float = 0.2,
    scale: float = 100.0,
) -> Float[Tensor, " concept"]:
    """How much more likely each text is on the exemplars than anywhere: for re-ranking captions.

    The mean of log p(text | image) over the exemplars, less `weight` times log p(text) over the probe.

    Source: Hernandez et al. 2022, arXiv 2201.11114, equation 2, with a contrastive model's p.
    """
    on_exemplars = torch.log_softmax(scale * exemplars.float() @ texts.float().T, 1).mean(0)
    anywhere = torch.softmax(scale * probe.float() @ texts.float().T, 1).mean(0).log()
    return on_exemplars - weight * anywhere


def exemplar(
    picture: Picture, map_: Float[Tensor, "row column"], threshold: float, *, dim: float = 0.25
) -> Picture:
    """The picture with all but the places above the threshold darkened to a share of their light."""
    size = (picture.height, picture.width)
    wide = torch.nn.functional.interpolate(map_[None, None].float(), size=size, mode="bilinear")[0, 0]
    light = np.where((wide > threshold).cpu().numpy()[..., None], 1.0, dim)
    return Image.fromarray((np.asarray(picture.convert("RGB")) * light).astype(np.uint8))
