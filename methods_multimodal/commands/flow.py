"""`mm-interp flow`: where a VLM's answer comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from methods_multimodal.commands.options import (
    Device,
    ModelName,
    Picture,
    Work,
    check_images,
    check_out,
    check_work,
    names_of,
    open_model,
    two_images,
    write_report,
)

_QUESTION = "what colour is the circle?"
_PAIR = ("red_circle_left_of_blue_square", "blue_circle_left_of_red_square")


def flow(
    model: ModelName = "tiny-llava",
    image: Annotated[
        list[Path] | None,
        typer.Option(help="An image; a second one of the same size, with another answer."),
    ] = None,
    question: Annotated[str, typer.Option(help="About both.")] = _QUESTION,
    window: Annotated[int, typer.Option(min=1, help="In how many layers at once attention is blocked.")] = 1,
    device: Device = None,
    work: Work = None,
    out: Picture = Path("flow.png"),
) -> None:
    """Where a VLM's answer comes from: states restored by layer and role, attention blocked, heads.

    The second image is the corruption: it differs from the first in the answer, and in nothing else if
    possible.
    """
    check_images(image or [])
    check_out(out)
    check_work(work)
    loaded = open_model(
        model, device, kind="vlm", otherwise="answers no questions about images. Give a VLM, as tiny-llava."
    )
    from methods_multimodal.report import flow_report

    pair = two_images(image or [], _PAIR)
    write_report(
        flow_report(loaded, pair, question, names_of(pair), window=window, model_name=model, folder=work), out
    )
