"""The report on a prompt: how did the picture come about, and where was each word attended to?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from methods_multimodal.core.kept import kept
from methods_multimodal.cross_attention import WordMaps, word_reader
from methods_multimodal.diffusion import DenoisingSteps, frames_of, pictures_of, step_reader, to_array
from methods_multimodal.plots import overlay, picture, word_lines
from methods_multimodal.report._page import Report, new_page, rounded
from mm_adapters import InputError, Model, Run

MOST_WORDS = 12


def diffusion_report(
    model: Model,
    prompt: str,
    *,
    seed: int = 0,
    steps: int = 25,
    model_name: str = "",
    folder: str | Path | None = None,
    **options: Any,
) -> Report:
    """Draws the prompt once, and shows its steps and where each word was attended to.

    `options` go to the pipeline (`guidance_scale`, `height`, ...). With a `folder`, what is drawn is
    written down there, step by step, and a run that was killed goes on.

    Raises: InputError for an empty prompt or fewer than one step, before anything runs.
    """
    if not prompt.strip() or steps < 1:
        raise InputError(
            f"This report takes a prompt with words and at least one step; not {prompt!r}, {steps}."
        )
    if model.preparer is not None:
        model.preparer.prepare(text=[prompt])  # A prompt that is too long would be cut silently.
    words = word_reader(model, prompt, options=options)
    frames = step_reader(model, steps)
    inputs = frames.inputs({**options, "prompt": prompt, "seed": seed, "output_type": "pt"})
    # Both read the latents; the frames keep them whole.
    reads = {read.site: read for read in (*words.reads(), *frames.reads())}
    runs: list[Run] = []

    def run() -> Run:
        if not runs:
            runs.append(model.run(inputs, read=list(reads.values())))
        return runs[0]

    settings: dict[str, Any] = {"inputs": inputs, "n_steps": steps}
    with kept(folder, job="diffusion_report", models={"model": model}, **settings) as work, work.calls(model):
        final = work.tensors("picture", lambda: {"": pictures_of(model, run().output)[0].float().cpu()})[""]
        shown = work.record("frames", DenoisingSteps, lambda: frames.pictures(model, run()))
        maps = work.record("maps", WordMaps, lambda: words.maps(run()))
    model_name = model_name or model.name
    numbers = _numbers(model_name, prompt, seed, shown, maps)
    return Report(_draw(model_name, prompt, final, shown, maps), numbers, tuple(_lines(numbers, maps)))


def _draw(
    model_name: str, prompt: str, final: torch.Tensor, frames: DenoisingSteps, maps: WordMaps
) -> Figure:
    array = to_array(final)
    shown = maps.words_of()[:MOST_WORDS]
    across = max(len(frames.steps) + 1, min(len(shown), 6), 2)
    down = 1 + -(-len(shown) // across) + 1
    page = new_page(2.7 * across, 2.75 * down + 0.5, f"{model_name}: “{prompt}”, {frames.n_steps} steps")
    grid = page.add_gridspec(down, across)
    what = "predicted picture" if frames.shows == "prediction" else "latent, decoded"
    for i, (step, frame) in enumerate(zip(frames.steps, frames_of(frames), strict=True)):
        title = f"{what} at\n" * (i == 0) + f"step {step + 1} of {frames.n_steps}"
        picture(frame, page.add_subplot(grid[0, i]), title=title)
    picture(array, page.add_subplot(grid[0, len(frames.steps)]), title="the picture")
    mean = maps.at()[0]
    for i, word in enumerate(shown):
        ax = page.add_subplot(grid[1 + i // across, i % across])
        overlay(mean[i], array, ax, unit="attention weight", title=f"attention to “{word}”", smooth=True)
    legend = page.add_subplot(grid[down - 1, across - 1])
    word_lines(maps, page.add_subplot(grid[down - 1, : across - 1]), legend=legend)
    return page


def _numbers(
    model_name: str, prompt: str, seed: int, frames: DenoisingSteps, maps: WordMaps
) -> dict[str, Any]:
    mean = maps.at()[0]
    return {
        "model": model_name,
        "prompt": prompt,
        "seed": seed,
        "steps": frames.n_steps,
        "frames": {"steps": list(frames.steps), "shows": frames.shows},
        "words": {
            word: {"attention": float(mean[i].mean()), "peak": _peak(mean[i]), "map": rounded(mean[i])}
            for i, word in enumerate(maps.words_of())
        },
        "attention_by_step": rounded(maps.strength()[:, 0]),
        "resolutions": list(maps.by_grid),
    }


def _lines(numbers: dict[str, Any], maps: WordMaps) -> Iterator[str]:
    yield f"{numbers['steps']} steps, seed {numbers['seed']}; latent {maps.latent[0]} x {maps.latent[1]}"
    for word, value in numbers["words"].items():
        down, across = value["peak"]
        yield (
            f"{word!r}: attention {value['attention']:.4f}, most at {down:.2f} of the height, "
            f"{across:.2f} of the width"
        )


def _peak(values: torch.Tensor) -> tuple[float, float]:
    """Where a map is largest, as fractions of the picture's height and width."""
    at = int(values.argmax())
    height, width = values.shape
    return (at // width + 0.5) / height, (at % width + 0.5) / width
