"""The report on a prompt's words: where is each attended to, and which pixels change without it?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from methods_multimodal.core.kept import kept
from methods_multimodal.cross_attention import (
    WordChanges,
    WordMaps,
    baseline_agreement,
    rank_agreement,
    word_changes,
    word_maps,
)
from methods_multimodal.cross_attention._sites import prompt_layouts
from methods_multimodal.cross_attention.agreement import function_words
from methods_multimodal.diffusion import pictures_of, to_array
from methods_multimodal.plots import film_strip, picture, word_change, word_lines, word_map
from methods_multimodal.report._page import Report, new_page, rounded
from mm_adapters import InputError, Model

MOST_WORDS, ACROSS = 10, 4
RECIPE = "relative"


def words_report(
    model: Model,
    prompt: str,
    *,
    words: Sequence[str] | None = None,
    seed: int = 0,
    steps: int = 25,
    threshold: float | None = 0.6,
    changed: bool = False,
    model_name: str = "",
    folder: str | Path | None = None,
    **options: Any,
) -> Report:
    """Draws the prompt once: a map of the attention to each word, and the way of one through the steps.

    A word's map is relative to the mean over all words of the prompt. Beside it stands how well it agrees
    with the map of words that name nothing ("a", "in"): near 1 or -1 it shows nothing of the word's own.

    Args:
        model: a pipeline that attends to words.
        prompt: what is drawn.
        words: those shown; all without.
        seed: of the noise.
        steps: the sampler's.
        threshold: from 0 to 1 of a map, where its outline is drawn; None for none.
        changed: draw the prompt once more for each word with that word blocked, and show which pixels change.
        model_name: for the title.
        folder: what is drawn is written down there, step by step, and a run that was killed goes on.
        options: the pipeline's.

    Raises: WordNotFoundError or InputError before anything runs; StoreError for a folder of other work.
    """
    if not prompt.strip() or steps < 1:
        raise InputError(f"A word sheet takes a prompt with words and one step; not {prompt!r}, {steps}.")
    run = {**options, "num_inference_steps": steps}
    inputs = {**run, "prompt": prompt, "seed": seed, "output_type": "pt"}
    drawn: list[Tensor] = []
    (layout,) = prompt_layouts(model, [prompt], inputs)
    every = list(dict.fromkeys([*(words or ()), *(word.text for word in layout.words[0])]))

    def draw() -> WordMaps:
        # Maps of all words, whichever are shown: the baseline is made of the function words'.
        maps, output = word_maps(model, inputs, words=every, keep=("step",))
        drawn.append(pictures_of(model, output)[0].float().cpu())
        work.tensors("picture", lambda: {"": drawn[0]})
        return maps

    settings: dict[str, Any] = {"inputs": inputs, "words": None if words is None else list(words)}
    with kept(folder, job="words_report", models={"model": model}, changed=changed, **settings) as work:
        with work.calls(model):
            maps = work.record("maps", WordMaps, draw)
            pixels = to_array(drawn[0] if drawn else work.tensors("picture", dict)[""])
        shown = tuple(dict.fromkeys(words or every))
        causal = None
        if changed:
            blocked = work.inside("blocked")
            causal = word_changes(model, prompt, shown, seed=seed, options=run, folder=blocked)
    numbers = {"model": model_name or model.name, "prompt": prompt, "seed": seed, "steps": steps}
    numbers |= _numbers(maps, causal, shown)
    return Report(_draw(maps, causal, pixels, numbers, threshold), numbers, tuple(_lines(numbers)))


def _numbers(maps: WordMaps, causal: WordChanges | None, shown: Sequence[str]) -> dict[str, Any]:
    names, mean, tables = maps.words_of(), maps.at()[0], maps.at(RECIPE)[0]
    agreement, baselines = baseline_agreement(tables, names)
    functional = function_words(names)
    by_word: dict[str, Any] = {}
    for word in shown:
        i = names.index(word)
        by_word[word] = {
            "attention": float(mean[i].mean()),
            "map": rounded(tables[i]),
            "agrees with": list(baselines[i]),
            "agreement": _number(agreement[i]),
        }
        if causal is not None:
            change = causal.of(word)
            ranks = rank_agreement(tables, change.expand(len(tables), -1, -1))
            others = [j for j in functional if j != i]
            by_word[word] |= {
                "changed": rounded(change, 4),
                "mean change": float(change.mean()),
                "attention and change": _number(ranks[i]),
                "function words' attention and change": _number(ranks[others].mean()),
            }
    return {
        "recipe": RECIPE,
        "words": by_word,
        "attention_by_step": rounded(maps.strength()[:, 0]),
        "layers": {g: list(x) for g, x in zip(maps.by_grid, maps.layers, strict=True)},
    }


def _number(value: Tensor) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(float(value)) else round(float(value), 4)


def _draw(
    maps: WordMaps,
    causal: WordChanges | None,
    pixels: Any,
    numbers: dict[str, Any],
    threshold: float | None,
) -> Figure:
    shown = list(numbers["words"])[:MOST_WORDS]
    across = min(ACROSS, len(shown) + 1)
    down = -(-(len(shown) + 1) // across)
    down_changed = -(-len(shown) // across) if causal else 0
    heights = [3.2 * down, *([3.4 * down_changed] if causal else []), 1.9, 2.3]
    page = new_page(3.2 * across, sum(heights) + 0.2, f"{numbers['model']}: “{numbers['prompt']}”")
    blocks: Any = page.subfigures(len(heights), 1, height_ratios=heights)
    top, *more, middle, bottom = blocks
    axes = top.subplots(down, across, squeeze=False).flatten()
    picture(pixels, axes[0], title="the picture")
    for ax, word in zip(axes[1:], shown, strict=False):
        note = _agreement(numbers["words"][word])
        word_map(maps, word, pixels, ax, recipe=RECIPE, threshold=threshold, note=note)
    for ax in axes[len(shown) + 1 :]:
        ax.axis("off")
    if causal is not None:
        axes = more[0].subplots(down_changed, across, squeeze=False).flatten()
        limit = float(causal.changed.max()) or 1.0
        for ax, word in zip(axes, shown, strict=False):
            word_change(causal, word, ax, limit=limit, note="\n".join(_causal(numbers["words"][word])))
        for ax in axes[len(shown) :]:
            ax.axis("off")
    mean = maps.at()[0]
    contrast = (mean.amax((-1, -2)) - mean.mean((-1, -2))) / mean.mean((-1, -2))
    strongest = max(shown, key=lambda word: float(contrast[maps.words_of().index(word)]))
    film_strip(maps, strongest, middle.subplots(), n_frames=8)
    by_step, legend = bottom.subplots(1, 2, width_ratios=[4, 1])
    word_lines(maps, by_step, legend=legend)
    return page


def _agreement(word: dict[str, Any]) -> str:
    if word["agreement"] is None:
        return "no other word to compare with"
    others = word["agrees with"]
    functional = len(function_words(others)) == len(others)
    said = ", ".join(others) if functional else "the mean of the others"
    return f"like that to {said}: {word['agreement']:+z.2f}"


def _causal(word: dict[str, Any]) -> tuple[str, str]:
    def said(name: str) -> str:
        return "–" if word[name] is None else f"{word[name]:+z.2f}"

    own, null = said("attention and change"), said("function words' attention and change")
    return f"rank correlation with its map {own},", f"with function words' maps {null}"


def _lines(numbers: dict[str, Any]) -> Iterator[str]:
    for word, value in numbers["words"].items():
        yield f"attention to {word!r}: {value['attention']:.4f}; its map is {_agreement(value)}"
        if "changed" in value:
            said = " ".join(_causal(value))
            yield f"changed by blocking {word!r}: {value['mean change']:.4f} a pixel; {said}"
