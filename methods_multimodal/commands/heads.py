"""`mm-interp heads`: what every head of an image tower says, over a folder of images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from methods_multimodal.commands.options import (
    BatchSize,
    Device,
    ModelName,
    SkipUnreadable,
    check_folder,
    open_model,
)
from mm_adapters import InputError


def heads(
    images: Annotated[Path, typer.Option(help="A folder of images; folders in it count too.")],
    model: ModelName = "tiny-clip",
    vocabulary: Annotated[
        str, typer.Option(help="A text file, one text a line; or general, or world (for tiny-clip).")
    ] = "general",
    texts: Annotated[int, typer.Option(min=1, help="How many texts name a head.")] = 5,
    top: Annotated[int, typer.Option(min=1, help="How many images are shown for a text.")] = 4,
    effects: Annotated[
        int,
        typer.Option(
            min=0, help="Images, of the first, on which every head is held at its mean in the running model."
        ),
    ] = 0,
    batch_size: BatchSize = 32,
    skip_unreadable: SkipUnreadable = False,
    device: Device = None,
    out: Annotated[
        Path, typer.Option(help="A folder: heads.html, heads.json, and what a killed run left.")
    ] = Path("heads"),
) -> None:
    """Names every head of a model's image tower in words: heads.html to read, heads.json to use.

    Names describe the direct path only; --effects N adds what each head does in the running model.
    A run that was killed goes on where it was, if it is started again with the same --out.
    """
    from methods_multimodal.text_explanations.vocabulary import vocabulary as words_of
    from mm_adapters.inputs.images import image_files

    if not images.is_dir():
        raise FileNotFoundError(f"--images {images}: there is no such folder.")
    files = image_files(images)
    words = words_of(vocabulary)
    if texts > len(words):
        raise InputError(f"--texts {texts}: the vocabulary has {len(words)}.")
    if effects == 1:
        raise InputError("--effects 1: an effect is a change from the mean over images. Give two or more.")
    check_folder(out)
    from PIL import Image

    from methods_multimodal.report.heads import unread_note, write_heads
    from methods_multimodal.text_explanations.head_effects import head_effects
    from methods_multimodal.text_explanations.name_heads import name_heads
    from mm_adapters.inputs.images import to_rgb

    why = "has no joint space of images and texts, so its heads have no words here."
    loaded = open_model(model, device, kind="contrastive", otherwise=why)
    names = name_heads(
        loaded,
        files,
        words,
        n_texts=texts,
        top=top,
        folder=out,
        batch_size=batch_size,
        skip_unreadable=skip_unreadable,
    )

    def picture_of(number: int) -> Image.Image:
        return to_rgb(files[number])

    measured = None
    if effects:
        measured = head_effects(
            loaded, files[:effects], words, batch_size=batch_size, skip_unreadable=skip_unreadable
        )
    page, numbers = write_heads(names, picture_of, model, out, measured)
    if (note := unread_note(names)) is not None:
        typer.echo(f"note: {note}", err=True)
    for name, why in names.unreadable:
        typer.echo(f"skipped {name}: {why}")
    typer.echo(f"wrote {page} and {numbers}")
