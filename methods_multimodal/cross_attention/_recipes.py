"""How the maps of many layers become one map a word."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from mm_adapters import InputError, WordNotFoundError

Maps = Float[Tensor, "image word height width"]
# How often, and how sharply, a map is spread over the pixels that attend to each other; chosen on
# prompts that no number reported here is measured on.
SPREADS, SHARPNESS = 4, 2


@runtime_checkable
class Layers(Protocol):
    """What a recipe reads: `WordMaps` is one."""

    @property
    def by_grid(self) -> Mapping[str, Tensor]: ...
    @property
    def all_words(self) -> Mapping[str, Tensor]: ...
    @property
    def stages(self) -> tuple[tuple[str, ...], ...]: ...
    @property
    def n_tokens(self) -> tuple[tuple[int, ...], ...]: ...
    @property
    def latent(self) -> tuple[int, int]: ...
    @property
    def n_steps(self) -> int: ...
    @property
    def n_images(self) -> int: ...
    @property
    def affinity(self) -> Tensor: ...
    @property
    def affinity_grid(self) -> tuple[int, int]: ...
    def prompt_of(self, image: int) -> int: ...


def make(record: Layers, recipe: str, steps: slice, grid: str | None) -> Maps:
    """One map a word. Raises: InputError for an unknown recipe or grid, or if parts were not kept."""
    if recipe not in NAMES:
        raise InputError(f"No recipe {recipe!r}; there is {', '.join(NAMES)}.")
    if steps != slice(None):
        need(record, "step")
    if grid is not None and grid not in record.by_grid:
        raise InputError(f"No layer of the resolution {grid!r}; there is {', '.join(record.by_grid)}.")
    grids = list(record.by_grid) if grid is None else [grid]
    if recipe == "relative":
        if not record.all_words:
            raise InputError("These maps came without the mean over all words. Make them again by word_maps.")
        return relative(
            record, *({g: of[g][steps] for g in grids} for of in (record.by_grid, record.all_words))
        )
    return _RECIPES[recipe](record, {g: record.by_grid[g][steps] for g in grids})


def need(record: Layers, axis: str) -> None:
    """Raises: InputError if this axis was averaged away."""
    first = next(iter(record.by_grid.values()))
    kept = {"step": len(first) == record.n_steps, "head": first.shape[2] > 1}
    if not kept[axis]:
        raise InputError(f"These maps are averaged over the {axis}s. Make them with keep=({axis!r},).")


def index_of(word: str, words: Sequence[str]) -> int:
    """Where a word stands. Raises: WordNotFoundError listing the words."""
    names = [w.casefold() for w in words]
    if word.casefold() not in names:
        raise WordNotFoundError(f"There is no map of {word!r}. The words with maps: {', '.join(words)}.")
    return names.index(word.casefold())


def mean(record: Layers, by_grid: dict[str, Tensor]) -> Maps:
    """The mean over steps, heads and layers of each resolution, then over resolutions."""
    means = [maps.mean((0, 1, 2)) for maps in by_grid.values()]
    sized = [F.interpolate(m, size=record.latent, mode="bilinear", align_corners=False) for m in means]
    return torch.stack(sized).mean(0)


def daam(record: Layers, by_grid: dict[str, Tensor]) -> Maps:
    """As the `daam` package 0.2.0: bicubic for each layer and head, then the mean over both.

    It sums over steps, takes the mean over a word's tokens, and leaves out the middle block and
    every layer at an eighth of the latent. What it gets wrong without a word (half the heads
    without guidance, images of a batch merged, other sizes) is right here.

    Source: Tang et al. 2022, arXiv 2210.04885, equation 5; daam/trace.py, 0.2.0.
    """
    need(record, "head")
    parts: list[Tensor] = []
    for grid, maps in by_grid.items():
        stages = record.stages[list(record.by_grid).index(grid)]
        eighth = int(grid.split("x")[0]) * 8 <= record.latent[0]
        kept = [i for i, stage in enumerate(stages) if stage != "mid" and not eighth]
        if not kept:
            continue
        summed = maps[:, kept].mean(0) * (record.n_steps if len(maps) == 1 else len(maps))
        flat = rearrange(summed, "layer head image word h w -> (layer head) (image word) h w")
        sized = F.interpolate(flat, size=record.latent, mode="bicubic").clamp(min=0)
        parts.append(rearrange(sized, "part (image word) h w -> part image word h w", word=maps.shape[4]))
    if not parts:
        raise InputError("daam's recipe takes no layer of this resolution.")
    counts = [[*n, *[1] * (parts[0].shape[2] - len(n))] for n in record.n_tokens]
    per_image = [counts[record.prompt_of(i)] for i in range(record.n_images)]
    tokens = torch.tensor(per_image, device=parts[0].device, dtype=parts[0].dtype)
    return torch.cat(parts).mean(0) / rearrange(tokens, "image word -> image word 1 1")


def spread(record: Layers, by_grid: dict[str, Tensor]) -> Maps:
    """Each layer standardised over pixels, so that all weigh the same; averaged; then each pixel gets
    the attention-weighted mean of the pixels that it attends to.

    Layers differ tenfold in contrast, and the flattest say where the thing is not.
    """
    if not record.affinity.numel():
        raise InputError(
            "These maps came without self-attention: make them with spread=True. (Layers with more than 1024 "
            "pixels are left out, and this model may have no others.)"
        )
    layers = [
        F.interpolate(_standard(layer), size=record.affinity_grid, mode="bicubic", align_corners=False)
        for maps in by_grid.values()
        for layer in maps.mean((0, 2))
    ]
    flat = rearrange(torch.stack(layers).mean(0), "image word h w -> image (h w) word")
    affinity = record.affinity.to(flat) ** SHARPNESS
    affinity = affinity / affinity.sum(-1, keepdim=True)
    for _ in range(SPREADS):
        flat = affinity @ flat
    maps = rearrange(flat, "image (h w) word -> image word h w", h=record.affinity_grid[0])
    return F.interpolate(maps, size=record.latent, mode="bicubic", align_corners=False)


def relative(record: Layers, by_grid: dict[str, Tensor], all_words: dict[str, Tensor]) -> Maps:
    """The logarithm of the attention to a word over the mean attention to the prompt's words.

    Each layer is standardised over pixels, so that all weigh the same, and layers are averaged. What all
    words share, that some pixels attend to words more than others do, is gone.
    """
    layers: list[Tensor] = []
    for grid, maps in by_grid.items():
        pairs = zip(maps.mean((0, 2)), all_words[grid].mean((0, 2)), strict=True)
        ratios = [
            word.clamp(min=1e-12).log() - every.clamp(min=1e-12).log()[:, None] for word, every in pairs
        ]
        layers += [
            F.interpolate(_standard(x), size=record.latent, mode="bicubic", align_corners=False)
            for x in ratios
        ]
    return torch.stack(layers).mean(0)


def unit_range(maps: Float[Tensor, "*any height width"]) -> Float[Tensor, "*any height width"]:
    """Each map from 0 (its smallest value) to 1 (its largest)."""
    low, high = reduce(maps, "... h w -> ... 1 1", "min"), reduce(maps, "... h w -> ... 1 1", "max")
    return (maps - low) / (high - low).clamp(min=1e-12)


def _standard(maps: Maps) -> Maps:
    centred = maps - reduce(maps, "i w h v -> i w 1 1", "mean")
    return centred / centred.std((-1, -2), keepdim=True).clamp(min=1e-12)


_RECIPES: dict[str, Callable[[Layers, dict[str, Tensor]], Tensor]] = {
    "mean": mean,
    "daam": daam,
    "spread": spread,
}
NAMES = (*_RECIPES, "relative")
