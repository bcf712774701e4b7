"""Local blend: outside of some words' regions, each step's latents are the source's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from methods_multimodal.core.grids import latent_grid
from methods_multimodal.cross_attention._sites import TextAttention, text_attention
from methods_multimodal.cross_attention.word_reader import Fold
from mm_adapters import InputError, Model, Read, TokenLayout

MOST_PIXELS = 256


@dataclass(frozen=True)
class LocalBlend:
    """Keeps what lies outside of some words' regions as it is in the source.

    `words` are of the source and the target together; a region is where their attention, summed over
    the steps so far and spread by one pixel, is above `threshold` of its largest value. From the
    step `start` (a share of all) on.

    Source: Hertz et al. 2022, arXiv 2208.01626, section 3.2.
    """

    words: tuple[str, ...]
    threshold: float = 0.3
    start: float = 0.2


class Blender:
    """Watches the words' attention during a run, and blends the latents after each step.

    The maps are those of the finest resolution with at most 16 x 16 pixels.
    """

    def __init__(
        self,
        model: Model,
        prompts: Sequence[str],
        layouts: Sequence[TokenLayout],
        blends: Mapping[int, LocalBlend],
        n_steps: int,
    ) -> None:
        self.blends = blends
        self.n_steps = n_steps
        self.folds: dict[str, Fold] = {}
        self.which = torch.zeros(len(blends), len(prompts), layouts[0].n_pos)
        for i, (row, blend) in enumerate(blends.items()):
            for prompt in (0, row):
                known = [w for w in blend.words if _holds(layouts[prompt], w)]
                for word in known:
                    self.which[i, prompt, layouts[prompt].where(word)] = 1.0
            for word in blend.words:
                if not any(_holds(layouts[p], word) for p in (0, row)):
                    layouts[row].where(word)  # Says which words there are.
        for layer in text_attention(model, layout=layouts[0]):
            self.folds[layer.site("pattern")] = Fold(self._to_words(layer))

    def reads(self) -> list[Read]:
        """Each layer's attention to the words, of every row."""
        return [Read(site, reduce=fold, rows="cond") for site, fold in self.folds.items()]

    def after_step(self, pipeline: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """The pipeline's callback at the end of a step."""
        latents = tensors["latents"]
        if latents.ndim != 4:
            raise InputError("Local blend takes latents of the shape [row, channel, height, width].")
        new = latents.clone()
        for i, (row, blend) in enumerate(self.blends.items()):
            if step >= int(blend.start * self.n_steps):
                region = self.region(i, row, blend, (latents.shape[-2], latents.shape[-1]))
                new[row] = torch.where(region.to(latents.device), latents[row], latents[0])
        return {"latents": new}

    def region(self, index: int, row: int, blend: LocalBlend, size: tuple[int, int]) -> Bool[Tensor, "_ _"]:
        """Where the words are, in the source or in the target."""
        means = [fold.sums[0] for fold in self.folds.values() if fold.sums]
        fine = [m for m in means if m.shape[-1] <= MOST_PIXELS] or means
        most = max(m.shape[-1] for m in fine)
        summed = torch.stack([m for m in fine if m.shape[-1] == most]).mean(0)[index]
        grid = latent_grid(most, size)
        heat: Float[Tensor, "row 1 _ _"] = summed[[0, row]].unflatten(-1, grid)[:, None]
        heat = F.max_pool2d(heat, 3, stride=1, padding=1)
        heat = F.interpolate(heat, size=size, mode="nearest")
        heat = heat / heat.amax((-1, -2), keepdim=True).clamp(min=1e-12)
        return (heat > blend.threshold).any(0)[0]

    def _to_words(self, layer: TextAttention):
        def to_words(pattern: Float[Tensor, "row head query key"]) -> Float[Tensor, "blend row pixel"]:
            words = pattern.float().mean(1)
            return torch.einsum("rpt,brt->brp", words, layer.of_text(self.which).to(words))

        return to_words


def _holds(layout: TokenLayout, word: str) -> bool:
    phrase = word.casefold().split()
    words = [w.text.casefold() for w in layout.words[0]]
    return any(words[i : i + len(phrase)] == phrase for i in range(len(words)))
