"""`mm-interp words`: which words drew which pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from methods_multimodal.commands.options import (
    DRAWS_NOTHING,
    PROMPT,
    Device,
    GuidanceScale,
    ModelName,
    Picture,
    Prompt,
    Seed,
    Steps,
    Work,
    check_out,
    check_work,
    open_model,
    write_report,
)


def words(
    model: ModelName = "tiny-sd",
    prompt: Prompt = PROMPT,
    word: Annotated[list[str] | None, typer.Option(help="A word or phrase; all words without.")] = None,
    seed: Seed = 0,
    steps: Steps = 25,
    guidance: GuidanceScale = 3.0,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Where a word's outline is drawn.")] = 0.5,
    device: Device = None,
    work: Work = None,
    out: Picture = Path("words.png"),
) -> None:
    """Which words drew which pixels: the picture, a map for each word, and its way through the steps."""
    check_out(out)
    check_work(work)
    loaded = open_model(model, device, kind="diffusion", otherwise=DRAWS_NOTHING)
    from methods_multimodal.report import words_report

    write_report(
        words_report(
            loaded,
            prompt,
            words=word,
            seed=seed,
            steps=steps,
            threshold=threshold,
            model_name=model,
            guidance_scale=guidance,
            folder=work,
        ),
        out,
    )
