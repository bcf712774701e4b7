"""Which words a denoiser looks at from each pixel: cross-attention as maps, step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from methods_multimodal._grids import latent_grid
from methods_multimodal._record import Record
from mm_adapters import HookedModel, InputError, Lens, Read, Run
from mm_adapters._tokens import TokenLayout


@dataclass(frozen=True)
class WordMaps(Record):
    """Attention from each latent position to each word, under the prompt (not the empty one).

    `by_grid["8x8"]` is the mean over the heads and layers of that resolution: the probability that
    goes to the word (summed over its tokens). `latent` is (height, width).
    """

    by_grid: dict[str, Float[Tensor, "step image word _ _"]]
    words: tuple[str, ...]
    latent: tuple[int, int]

    def at(
        self, grid: str | None = None, steps: slice = slice(None)
    ) -> Float[Tensor, "image word height width"]:
        """The mean over steps of one resolution, or of all, at the size of the latent."""
        chosen = self.by_grid if grid is None else {grid: self.by_grid[grid]}
        means = [maps[steps].mean(0) for maps in chosen.values()]
        sized = [F.interpolate(m, size=self.latent, mode="bilinear", align_corners=False) for m in means]
        return torch.stack(sized).mean(0)

    def by_step(self) -> Float[Tensor, "step image word height width"]:
        """The mean over resolutions at each step."""
        n_steps = len(next(iter(self.by_grid.values())))
        return torch.stack([self.at(steps=slice(i, i + 1)) for i in range(n_steps)])

    def strength(self) -> Float[Tensor, "step image word"]:
        """The attention to each word at each step: the mean over pixels, then over resolutions."""
        return torch.stack([maps.mean((-1, -2)) for maps in self.by_grid.values()]).mean(0)


def prompt_layout(model: HookedModel, prompt: str, tower: str = "text") -> TokenLayout:
    """Which positions of a prompt, padded as the pipeline pads it, are which word."""
    return model.prompt_layout(tower, [prompt])


@dataclass(frozen=True)
class WordReader:
    """What to read in a run to get `WordMaps` from it, so that one run can serve several methods."""

    words: tuple[str, ...]
    positions: tuple[tuple[int, ...], ...]
    sites: tuple[str, ...]
    size: str

    def reads(self) -> list[Read]:
        """Only the words' columns of each pattern are kept, averaged over heads."""

        def kept(pattern: Tensor) -> Tensor:
            seen = reduce(pattern.float(), "image head pos token -> image pos token", "mean")
            return torch.stack([seen[..., list(p)].sum(-1) for p in self.positions], 1)

        size = Read(self.size, reduce=lambda x: torch.tensor(x.shape[-2:])[None], steps=[0])
        return [*(Read(site, reduce=kept, rows="cond") for site in self.sites), size]

    def maps(self, run: Run) -> WordMaps:
        """The maps, from a run with these reads."""
        height, width = (int(n) for n in run[self.size].flatten())
        layers: dict[tuple[int, int], list[Tensor]] = {}
        for site in self.sites:
            layers.setdefault(latent_grid(run[site].shape[-1], (height, width)), []).append(run[site])
        by_grid = {
            f"{rows}x{columns}": rearrange(torch.stack(maps).mean(0), "s i w (h c) -> s i w h c", h=rows)
            for (rows, columns), maps in sorted(layers.items(), reverse=True)
        }
        return WordMaps(by_grid=by_grid, words=self.words, latent=(height, width))


def word_reader(
    model: HookedModel, prompt: Any, words: Sequence[str] | None = None, denoiser: str = "denoiser"
) -> WordReader:
    """A reader of these words or phrases of the prompt; of all its words by default.

    Raises: WordNotFoundError if a word is not in the prompt; InputError if the prompt is not one
    string, or nothing attends to words.
    """
    if not isinstance(prompt, str):
        raise InputError(f"Word maps are of one prompt, a string; this is a {type(prompt).__name__}.")
    sites = [s.name for s in model.sites(f"{denoiser}.*cross_attn.hook_pattern") if s.reason is None]
    if not sites:
        raise InputError(f"The {denoiser} has no cross-attention, so there are no word maps.")
    layout = prompt_layout(model, prompt)
    shown = list(dict.fromkeys(w.text for w in layout.words[0])) if words is None else list(words)
    if not shown:
        raise InputError("The prompt has no words, so there are no word maps.")
    positions = tuple(tuple(layout.where(word)) for word in shown)
    return WordReader(tuple(shown), positions, tuple(sites), f"{denoiser}.hook_in")


def word_maps(
    model: HookedModel,
    inputs: Mapping[str, Any],
    *,
    words: Sequence[str] | None = None,
    denoiser: str = "denoiser",
    lens: Lens | None = None,
) -> tuple[WordMaps, Any]:
    """Where each word of a prompt is attended to, and the pipeline's output of the same run.

    `inputs` are the pipeline's own (`prompt`, `seed`, `num_inference_steps`, ...).

    Source: Tang et al. 2022, arXiv 2210.04885 (DAAM); Hertz et al. 2022, arXiv 2208.01626.
    Raises: as `word_reader`, before anything runs.
    """
    reader = word_reader(model, inputs.get("prompt"), words, denoiser)
    run = (lens or model).run(inputs, read=reader.reads())
    return reader.maps(run), run.output
