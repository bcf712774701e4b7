"""`mm-interp trace`: at which layers and steps a word is read."""

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
    Steps,
    Work,
    check_out,
    check_work,
    open_model,
    write_report,
)


def trace(
    word: Annotated[str, typer.Option(help="The word in question.")] = "red",
    other: Annotated[str, typer.Option(help="The word whose keys and values are put in its place.")] = "blue",
    model: ModelName = "tiny-sd",
    prompt: Prompt = PROMPT,
    positions: Annotated[
        str,
        typer.Option(help="Where it is read: 'word', 'after' (it and all that follows), or a later word."),
    ] = "after",
    seeds: Annotated[int, typer.Option(min=1, help="How many pictures the intervals are over.")] = 3,
    steps: Steps = 20,
    guidance: GuidanceScale = 3.0,
    judge: Annotated[
        str, typer.Option(help="The model like CLIP that says what a picture shows.")
    ] = "tiny-clip",
    device: Device = None,
    work: Work = None,
    out: Picture = Path("trace.png"),
) -> None:
    """At which layers and steps a word is read, by giving another's keys and values; beside matched controls.

    Also what blocking the word changes, and an estimate of each patch by one gradient.
    """
    check_out(out)
    check_work(work)
    loaded = open_model(model, device, kind="diffusion", otherwise=DRAWS_NOTHING)
    loaded.prompt_layout("text", [prompt]).where(word)  # Before the judge is loaded.
    from methods_multimodal.cross_attention.metrics import clip_contrast
    from methods_multimodal.report import trace_report

    metric = clip_contrast(open_model(judge, device), prompt, prompt.replace(word, other, 1))
    write_report(
        trace_report(
            loaded,
            prompt,
            word,
            other,
            metric,
            positions=positions,
            seeds=range(seeds),
            steps=steps,
            model_name=model,
            unit=f"{judge}'s cosine, other minus word",
            guidance_scale=guidance,
            folder=work,
        ),
        out,
    )
