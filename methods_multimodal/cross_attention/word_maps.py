"""Where a denoiser attends to each word: cross-attention as maps, summed up as they appear."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from methods_multimodal.cross_attention.word_maps_record import WordMaps
from methods_multimodal.cross_attention.word_reader import WordReader, word_reader
from methods_multimodal.diffusion.step_count import fewest_steps
from mm_adapters import Model


def word_maps(
    model: Model,
    inputs: Mapping[str, Any],
    *,
    words: Sequence[str] | Sequence[Sequence[str]] | str | None = None,
    keep: Collection[str] = ("step",),
    spread: bool = False,
    denoiser: str = "denoiser",
) -> tuple[WordMaps, Any]:
    """Where each word of each prompt is attended to, and the pipeline's output of the same run.

    `inputs` are the pipeline's own (`prompt`, `seed`, `num_inference_steps`, ...); of several
    prompts and of several images a prompt each has maps of its own. The rest as in `word_reader`.
    Reading leaves the pictures bit-identical.

    Source: Tang et al. 2022, arXiv 2210.04885 (DAAM); Hertz et al. 2022, arXiv 2208.01626.
    Raises: as `word_reader`, before anything runs.
    """
    reader = word_reader(
        model,
        inputs.get("prompt", inputs.get("text")),
        words,
        keep=keep,
        spread=spread,
        denoiser=denoiser,
        per_prompt=int(inputs.get("num_images_per_prompt") or 1),
        n_steps=fewest_steps(model, inputs),
        options=inputs,
    )
    run = model.run(inputs, read=reader.reads())
    return reader.maps(run), run.output


__all__ = ["WordMaps", "WordReader", "word_maps", "word_reader"]
