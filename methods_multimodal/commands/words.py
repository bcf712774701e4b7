"""`mm-interp words` and `mm-interp trace`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mm_adapters import InputError

_FORMATS = (".png", ".pdf", ".svg", ".jpg", ".webp")
_PROMPT = "a large red circle in the middle on a white background"

Model = Annotated[str, typer.Option(help="A shipped model, a folder, or an id on the hub.")]
Prompt = Annotated[str, typer.Option(help="What to draw.")]
Steps = Annotated[int, typer.Option(min=1, help="The sampler's steps.")]
Guidance = Annotated[float, typer.Option(help="The guidance scale.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; the first GPU if there is one.")]


def register(app: typer.Typer) -> None:
    """Adds both commands to `mm-interp`."""
    app.command("words")(words)
    app.command("trace")(trace)


def words(
    model: Model = "tiny-sd",
    prompt: Prompt = _PROMPT,
    word: Annotated[list[str] | None, typer.Option(help="A word or phrase; all words without.")] = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    steps: Steps = 25,
    guidance: Guidance = 3.0,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Where a word's outline is drawn.")] = 0.5,
    device: Device = None,
    out: Annotated[Path, typer.Option(help="The picture; its numbers go beside it, as .json.")] = Path(
        "words.png"
    ),
) -> None:
    """Which words drew which pixels: the picture, a map for each word, and its way through the steps."""
    loaded = _pipeline(model, device, out)
    from methods_multimodal.report import words_report

    _write(
        words_report(
            loaded, prompt, words=word, seed=seed, steps=steps, threshold=threshold, model_name=model,
            guidance_scale=guidance,
        ),
        out,
    )  # fmt: skip


def trace(
    word: Annotated[str, typer.Option(help="The word in question.")] = "red",
    other: Annotated[str, typer.Option(help="What is put in its place.")] = "blue",
    model: Model = "tiny-sd",
    prompt: Prompt = _PROMPT,
    positions: Annotated[
        str, typer.Option(help="'word', 'after' (and all that follows it), or a later word.")
    ] = "after",
    seeds: Annotated[int, typer.Option(min=1, help="How many pictures the intervals are over.")] = 3,
    steps: Steps = 20,
    guidance: Guidance = 3.0,
    judge: Annotated[
        str, typer.Option(help="The model like CLIP that says what a picture shows.")
    ] = "tiny-clip",
    device: Device = None,
    out: Annotated[Path, typer.Option(help="The picture; its numbers go beside it, as .json.")] = Path(
        "trace.png"
    ),
) -> None:
    """Which layers and steps bring a word into the picture: patched, blocked, and by one gradient."""
    loaded = _pipeline(model, device, out)
    loaded.prompt_layout("text", [prompt]).where(word)  # Before the judge is loaded.
    from methods_multimodal.cross_attention.metrics import clip_contrast
    from methods_multimodal.report import trace_report
    from mm_adapters.loading import load

    metric = clip_contrast(load(judge, device=device), prompt, prompt.replace(word, other, 1))
    _write(
        trace_report(
            loaded, prompt, word, other, metric, positions=positions, seeds=range(seeds), steps=steps, model_name=model,
            unit=f"{judge}'s cosine, other minus word", guidance_scale=guidance,
        ),
        out,
    )  # fmt: skip


def _pipeline(model: str, device: str | None, out: Path):
    if out.suffix.lower() not in _FORMATS:
        raise InputError(f"--out {out}: the picture's format is one of {', '.join(_FORMATS)}.")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {out}: there is no folder {out.absolute().parent}.")
    from mm_adapters.loading import load

    try:
        loaded = load(model, device=device)
    except ValueError as error:  # An unknown device.
        raise InputError(str(error)) from None
    if loaded.kind != "diffusion":
        raise InputError(
            f"{model} draws nothing: its words have no pixels. Give a text-to-image model, as tiny-sd."
        )
    return loaded


def _write(report, out: Path) -> None:
    picture, numbers = report.write(out)
    for line in (*report.lines, f"wrote {picture} and {numbers}"):
        typer.echo(line)
