"""What a model's output says, in the few ways that libraries write it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mm_adapters import InputError, Model


@dataclass(frozen=True)
class Contrast:
    """A contrastive output: the model's own logits, and the unit vector of each text."""

    logits: Float[Tensor, "image text"]
    texts: Float[Tensor, "text d_joint"]


def contrast_of(output: Any) -> Contrast:
    """The logits and texts of a contrastive model's output.

    Raises: InputError if the output has no image or no text in it.
    """
    if isinstance(output, tuple) and len(output) >= 3:  # open_clip without output_dict
        output = dict(zip(("image_features", "text_features", "logit_scale"), output, strict=False))
    if isinstance(output, Mapping) and "image_features" in output:
        images, texts = output["image_features"], output["text_features"]
        if images is None or texts is None:
            raise InputError("An image-text logit needs images and text; give both.")
        return Contrast(output["logit_scale"] * images @ texts.T, texts)
    logits, texts = (getattr(output, name, None) for name in ("logits_per_image", "text_embeds"))
    if logits is None or texts is None:
        raise InputError(f"{type(output).__name__} holds no image-text logits: the model is not contrastive.")
    return Contrast(logits, texts)


def logit_scale(model: Model) -> Float[Tensor, ""]:
    """What the model multiplies a cosine with."""
    path = model.record.logit_scale
    if path is None:
        raise InputError(f"{model.name} has no logit scale: it is not a contrastive model.")
    return attrgetter(path)(model.wrapped).detach().float().exp().reshape(())


def vocabulary_logits(model: Model, output: Any, tower: str = "language") -> Float[Tensor, "row pos token"]:
    """The logits of a model with a language tower."""
    return model.check_tower(tower).vocabulary_logits(output)


def answer_ids(ids: Int[Tensor, " pos"], prompt: Int[Tensor, " prompt"]) -> Int[Tensor, " new"]:
    """What was generated after a prompt; all of it where a decoder of its own wrote it."""
    begins_with_it = len(ids) >= len(prompt) and torch.equal(ids[: len(prompt)], prompt.to(ids))
    return ids[len(prompt) :] if begins_with_it else ids


def probabilities(logits: Float[Tensor, "image text"]) -> Float[Tensor, "image text"]:
    """How likely each text is, among these texts, for each image."""
    return torch.softmax(logits.float(), -1)
