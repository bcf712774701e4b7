"""How a word's map is best set against the others': every way that was tried, on validation prompts.

python -m tests.quality.word_recipes [MODEL] [--n 24]

The recipe "relative" of `WordMaps.at` was chosen here, by the IoU of the noun's map with the drawn object
less that of the map of "in".
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

import mm_adapters as mm
from methods_multimodal.cross_attention import WordMaps, segment, word_maps
from tests.quality.prompts import GUIDANCE, STEPS, one_object, region
from tests.quality.word_maps import BASELINE, KINDS, words_of

AGAINST = ("nothing", "share", "standardised share", "standardised log share", "difference of standardised")
SPREADS = ((0, 1), (1, 2), (2, 2), (4, 2))  # How often maps are spread, by which power of the affinity.
OLD = ("mean", "daam", "spread")


def standard(maps: Tensor) -> Tensor:
    """Each map less its mean, by its standard deviation."""
    centred = maps - maps.mean((-1, -2), keepdim=True)
    return centred / centred.std((-1, -2), keepdim=True).clamp(min=1e-12)


def against(maps: Tensor, mean: Tensor, how: str) -> Tensor:
    """One layer's maps, [image, word, height, width], set against the mean over all words."""
    if how == "nothing":
        return standard(maps)
    if how == "difference of standardised":
        return standard(maps) - standard(mean)
    share = maps.clamp(min=1e-12) / mean.clamp(min=1e-12)
    if how == "share":
        return share
    return standard(share.log() if "log" in how else share)


def formed(maps: WordMaps) -> Iterator[tuple[str, Tensor]]:
    """Every way's maps, [image, word, height, width]."""
    for recipe in OLD:
        yield recipe, maps.at(recipe)
    for how in AGAINST:
        layers = [
            F.interpolate(against(word, every[:, None], how), size=maps.affinity_grid, mode="bicubic")
            for grid, of in maps.by_grid.items()
            for word, every in zip(of.mean((0, 2)), maps.all_words[grid].mean((0, 2)), strict=True)
        ]
        flat = rearrange(torch.stack(layers).mean(0), "image word h w -> image (h w) word")
        for times, power in SPREADS:
            affinity = maps.affinity**power
            spread = flat
            for _ in range(times):
                spread = affinity / affinity.sum(-1, keepdim=True) @ spread
            yield (
                f"{how}, spread {times} times",
                rearrange(spread, "i (h w) word -> i word h w", h=maps.affinity_grid[0]),
            )


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="tiny-sd")
    parser.add_argument("--n", type=int, default=24, help="validation prompts")
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    model = mm.load(args.model)
    model.wrapped.set_progress_bar_config(disable=True)
    cases = one_object(args.n, "validation")
    inputs = {
        "prompt": [text for _, text in cases],
        "seed": list(range(args.n)),
        "num_inference_steps": args.steps,
        "guidance_scale": GUIDANCE,
        "output_type": "pt",
    }
    words = [words_of(scene) for scene, _ in cases]
    maps, output = word_maps(model, inputs, words=words, keep=("head",), spread=True)
    regions = torch.stack([region(image) for image in output.images.float()])
    live = regions.flatten(1).any(1)
    out: dict[str, dict[str, float]] = {}
    for name, of in formed(maps):
        noun = segment(of[live, 0], regions[live])
        other = segment(of[live, KINDS.index(BASELINE)], regions[live])
        values = noun.mean_iou(noun.best), other.mean_iou(noun.best)
        out[name] = {
            "noun": values[0],
            BASELINE: values[1],
            "difference": values[0] - values[1],
            "threshold": noun.best,
        }
    for name, found in sorted(out.items(), key=lambda pair: -pair[1]["difference"]):
        print(f"{name:42s}", "  ".join(f"{k} {v:.2f}" for k, v in found.items()))
    print(f"{len(out)} ways tried on {int(live.sum())} pictures")
    return out


if __name__ == "__main__":
    main(sys.argv[1:])
