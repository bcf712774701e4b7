"""Unit vectors of texts and images in a model's joint space, through either engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from methods_multimodal.core.batches import batches
from methods_multimodal.core.model import model_summary
from mm_adapters import Model


def embed(model: Model, items: Any, tower: str, batch_size: int = 64) -> Float[Tensor, "row width"]:
    """The model's un-normalised embeddings of raw or prepared images ("vision") or texts ("text")."""
    view = model.check_tower(tower)
    rows = [
        model_summary(view, model.run(inputs).output) for inputs in batches(model, view, items, batch_size)
    ]
    return torch.cat(rows)


def unit(vectors: Float[Tensor, "*row width"]) -> Float[Tensor, "*row width"]:
    """The vectors, of length one."""
    return torch.nn.functional.normalize(vectors, dim=-1)


def embed_texts(model: Model, texts: Sequence[str], batch_size: int = 256) -> Float[Tensor, "text width"]:
    """The texts' unit vectors."""
    return unit(embed(model, list(texts), "text", batch_size))


def classifier(
    model: Model, names: Sequence[str], templates: Sequence[str] = ("a photo of {}",)
) -> Float[Tensor, "name width"]:
    """A zero-shot classifier: of each name the unit mean of the unit vectors of its texts.

    Source: Radford et al. 2021, arXiv 2103.00020, section 3.1.4 (prompt ensembling).
    """
    flat = embed_texts(model, [template.format(name) for name in names for template in templates])
    return unit(flat.reshape(len(names), len(templates), -1).mean(1))
