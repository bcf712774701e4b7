"""`mm-interp words`: where each word is attended to, and which pixels change without it."""

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
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Where a word's outline is drawn.")] = 0.6,
    changed: Annotated[
        bool,
        typer.Option("--changed", help="Block each word too: which pixels change. One more picture each."),
    ] = False,
    device: Device = None,
    work: Work = None,
    out: Picture = Path("words.png"),
) -> None:
    """Where each word of a prompt is attended to; with --changed, which pixels change when it is blocked.

    A map says where a word is attended to, not what it drew: beside each stands how well it agrees with the
    map of words that name nothing ("a", "in").
    """
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
            changed=changed,
            model_name=model,
            guidance_scale=guidance,
            folder=work,
        ),
        out,
    )
