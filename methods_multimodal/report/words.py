"""The report on a prompt's words: where is each attended to, and when?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from methods_multimodal.core.kept import kept
from methods_multimodal.cross_attention import WordMaps, word_maps
from methods_multimodal.diffusion import pictures_of, to_array
from methods_multimodal.plots import film_strip, picture, word_lines, word_map
from methods_multimodal.report._page import Report, new_page, rounded
from mm_adapters import InputError, Model

MOST_WORDS, ACROSS = 10, 4


def words_report(
    model: Model,
    prompt: str,
    *,
    words: Sequence[str] | None = None,
    seed: int = 0,
    steps: int = 25,
    threshold: float | None = 0.5,
    model_name: str = "",
    folder: str | Path | None = None,
    **options: Any,
) -> Report:
    """Draws the prompt once: a map for each word, its outline at `threshold`, and the strongest's steps.

    With a `folder`, what is drawn is written down there, step by step, and a run that was killed goes on.

    Raises: WordNotFoundError or InputError before anything runs; StoreError for a folder of other work.
    """
    if not prompt.strip() or steps < 1:
        raise InputError(f"A word sheet takes a prompt with words and one step; not {prompt!r}, {steps}.")
    inputs = {**options, "prompt": prompt, "seed": seed, "num_inference_steps": steps, "output_type": "pt"}
    drawn: list[Tensor] = []

    def draw() -> WordMaps:
        maps, output = word_maps(model, inputs, words=words, keep=("step",), spread=True)
        drawn.append(pictures_of(model, output)[0].float().cpu())
        work.tensors("picture", lambda: {"": drawn[0]})
        return maps

    settings: dict[str, Any] = {"inputs": inputs, "words": None if words is None else list(words)}
    with kept(folder, job="words_report", models={"model": model}, **settings) as work, work.calls(model):
        maps = work.record("maps", WordMaps, draw)
        pixels = to_array(drawn[0] if drawn else work.tensors("picture", dict)[""])
    recipe = "spread" if maps.affinity.numel() else "mean"
    shown = maps.words_of()[:MOST_WORDS]
    model_name = model_name or model.name
    across = min(ACROSS, len(shown) + 1)
    down = -(-(len(shown) + 1) // across)
    page = new_page(3.0 * across, 3.0 * down + 4.4, f"{model_name}: “{prompt}”")
    thirds: Any = page.subfigures(3, 1, height_ratios=[3.0 * down, 1.9, 2.3])
    top, middle, bottom = thirds
    axes = top.subplots(down, across, squeeze=False).flatten()
    picture(pixels, axes[0], title="the picture")
    for ax, word in zip(axes[1:], shown, strict=False):
        word_map(maps, word, pixels, ax, recipe=recipe, threshold=threshold)
    for ax in axes[len(shown) + 1 :]:
        ax.axis("off")
    mean = maps.at()[0]
    contrast = ((mean.amax((-1, -2)) - mean.mean((-1, -2))) / mean.mean((-1, -2)))[: len(shown)]
    strongest = shown[int(contrast.argmax())]
    film_strip(maps, strongest, middle.subplots(), n_frames=8)
    by_step, legend = bottom.subplots(1, 2, width_ratios=[4, 1])
    word_lines(maps, by_step, legend=legend)
    numbers = {
        "model": model_name,
        "prompt": prompt,
        "seed": seed,
        "steps": steps,
        "recipe": recipe,
        "words": {
            word: {"attention": float(mean[i].mean()), "map": rounded(maps.heat(word, recipe=recipe))}
            for i, word in enumerate(maps.words_of())
        },
        "attention_by_step": rounded(maps.strength()[:, 0]),
        "layers": {g: list(x) for g, x in zip(maps.by_grid, maps.layers, strict=True)},
    }
    lines = [f"{w!r}: attention {v['attention']:.4f}" for w, v in numbers["words"].items()]
    return Report(page, numbers, tuple(lines))
