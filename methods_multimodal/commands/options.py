"""What the commands share: their options, opening a model, checking where the results go."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from mm_adapters import InputError, Model

FORMATS = (".png", ".pdf", ".svg", ".jpg", ".webp")
DRAWS_NOTHING = "draws nothing: its words have no pixels. Give a text-to-image model, as tiny-sd."
PROMPT = "a large red circle in the middle on a white background"

ModelName = Annotated[str, typer.Option("--model", help="A shipped model, a folder, or an id on the hub.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; the first GPU if there is one.")]
Seed = Annotated[int, typer.Option(help="Of the noise.")]
Steps = Annotated[int, typer.Option(min=1, help="The sampler's steps.")]
GuidanceScale = Annotated[float, typer.Option("--guidance", help="The guidance scale.")]
Prompt = Annotated[str, typer.Option(help="What to draw.")]
Picture = Annotated[Path, typer.Option(help="The picture; its numbers go beside it, as .json.")]
SkipUnreadable = Annotated[
    bool, typer.Option("--skip-unreadable", help="List pictures that cannot be read, and go on.")
]
Work = Annotated[
    Path | None,
    typer.Option(help="A folder to write work down in as it is done: a run that was killed goes on there."),
]
BatchSize = Annotated[int, typer.Option(min=1)]


def check_out(out: Path) -> None:
    """Raises: InputError for a format that no picture has; FileNotFoundError if its folder is not there."""
    if out.suffix.lower() not in FORMATS:
        raise InputError(f"--out {out}: the picture's format is one of {', '.join(FORMATS)}.")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {out}: there is no folder {out.absolute().parent}.")
    if out.is_dir():
        raise InputError(f"--out {out} is a folder; give a file in it.")
    if not os.access(out.absolute().parent, os.W_OK | os.X_OK):
        raise InputError(f"--out {out}: its folder cannot be written to. Give another one.")


def check_folder(out: Path, option: str = "--out") -> None:
    """Raises: InputError if a folder of results would take the place of a file, or cannot be written to."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{option} {out} is a file; give a folder.")
    nearest = next(place for place in (out, *out.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise InputError(f"{option} {out}: {nearest} is a file, so it has no folders.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{option} {out}: {nearest} cannot be written to. Give another folder.")


def check_work(work: Path | None) -> None:
    """Raises: InputError as `check_folder`."""
    if work is not None:
        check_folder(work, "--work")


def open_model(name: str, device: str | None, *, kind: str | None = None, otherwise: str = "") -> Model:
    """The model of this name.

    Raises: InputError, with the model's name before `otherwise`, for one that is not of this kind.
    """
    from mm_adapters import load

    model: Any = load(name, device=device)
    if kind is not None and model.kind != kind:
        raise InputError(f"{name} {otherwise}")
    return model


def write_report(report: Any, out: Path) -> None:
    """Writes a report, and says its lines and where it is."""
    picture, numbers = report.write(out)
    for line in (*report.lines, f"wrote {picture} and {numbers}"):
        typer.echo(line)


def check_images(images: list[Path]) -> None:
    """Raises: InputError for more than two images; FileNotFoundError for one that is not there."""
    if len(images) > 2:
        raise InputError(f"a report is about one image and one to compare it with; {len(images)} were given.")
    for path in images:
        if not path.is_file():
            raise FileNotFoundError(f"There is no image {path}.")


def two_images(images: list[Path], defaults: tuple[str, str]) -> list[Path]:
    """The user's images; sample pictures in place of what is missing."""
    from mm_adapters.zoo import sample_images

    samples = sample_images()
    unused = (
        [samples[name] for name in reversed(defaults)] if len(images) == 1 else [samples[n] for n in defaults]
    )
    fresh = [s for s in unused if s.resolve() not in {i.resolve() for i in images}]
    return [*images, *fresh][:2]


def names_of(images: list[Path]) -> list[str]:
    """The images' names; numbered where two are called the same."""
    names = [path.name for path in images]
    return names if len(set(names)) == len(names) else [f"{i + 1}. {name}" for i, name in enumerate(names)]
