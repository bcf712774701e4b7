"""`mm-interp lens`: what a model would say, or draw, if it stopped after each layer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from methods_multimodal.commands.options import (
    PROMPT,
    Device,
    GuidanceScale,
    ModelName,
    Picture,
    Prompt,
    Seed,
    Steps,
    check_out,
    open_model,
    write_report,
)


def lens(
    model: ModelName = "tiny-llava",
    image: Annotated[
        Path | None, typer.Option(help="A picture; without, one that ships with the package.")
    ] = None,
    question: Annotated[str, typer.Option(help="Of a model that answers.")] = "what colour is the circle?",
    text: Annotated[
        list[str] | None,
        typer.Option(help="A candidate: a word of a model that answers, a text of one like CLIP."),
    ] = None,
    prompt: Prompt = PROMPT,
    raw: Annotated[
        bool, typer.Option("--raw", help="Without the final norm, of a model that answers.")
    ] = False,
    seed: Seed = 0,
    steps: Steps = 20,
    guidance: GuidanceScale = 3.0,
    device: Device = None,
    out: Picture = Path("lens.png"),
) -> None:
    """What a model says after each layer: its answer, an image's nearest text, or what a prompt draws.

    Of a model that answers: the likeliest words where the answer begins, and where in the image candidates
    are said; of one like CLIP: the texts' cosines with the image and with every patch; of a pipeline: the
    picture that the text encoder's states after each layer draw.
    """
    check_out(out)
    loaded = open_model(model, device)
    from methods_multimodal.report._lens import lens_report

    write_report(
        lens_report(
            loaded,
            image=image,
            question=question,
            texts=text,
            prompt=prompt,
            final_norm=not raw,
            seed=seed,
            steps=steps,
            guidance_scale=guidance,
            model_name=model,
        ),
        out,
    )
