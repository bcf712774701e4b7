"""`mm-interp probe`: which variables can be read off which layers and tokens."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from methods_multimodal.commands.options import (
    BatchSize,
    Device,
    ModelName,
    Picture,
    Work,
    check_out,
    check_work,
    open_model,
    write_report,
)
from mm_adapters import InputError, Model

_INPUTS = ("image", "text", "prompt", "seed")
_TYPE = "type"


def probe(
    model: ModelName = "tiny-clip",
    table: Annotated[
        Path | None,
        typer.Option(
            help="A CSV file, a row an input: columns image (a file), text, prompt, seed, type; others are "
            "variables. Without it, scenes of the zoo's world."
        ),
    ] = None,
    sites: Annotated[str, typer.Option(help="A glob: the layers.")] = "vision.blocks.*.hook_resid_post",
    role: Annotated[
        list[str] | None, typer.Option(help="Tokens that are averaged: mean, last, class, patch, word, ...")
    ] = None,
    step: Annotated[
        list[int] | None, typer.Option(help="Of a sampling loop: steps, from 0; all without.")
    ] = None,
    head: Annotated[str, typer.Option(help="linear, or mlp.")] = "linear",
    scenes: Annotated[int, typer.Option(min=30, help="How many scenes, without a table.")] = 300,
    steps: Annotated[int, typer.Option(min=1, help="The sampler's steps.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the split and the nulls.")] = 0,
    batch_size: BatchSize = 32,
    device: Device = None,
    work: Work = None,
    out: Picture = Path("probe.png"),
) -> None:
    """Which variables can be read off which layers and tokens: probes, beside their nulls.

    Nulls are shuffled labels, a copy with shuffled weights, and, of rows with a type, a control task. The
    record goes beside the picture, as .safetensors.
    """
    check_out(out)
    check_work(work)
    given = None if table is None else read_table(table)
    loaded = open_model(model, device)
    rows = _world(loaded, scenes) if given is None else given
    from methods_multimodal.probing import probe as sweep
    from methods_multimodal.report.probing import probe_report

    types = [row[_TYPE] for row in rows] if _TYPE in rows[0] else None
    names = [name for name in rows[0] if name not in (*_INPUTS, _TYPE)]
    sheet = sweep(
        loaded,
        inputs_of(loaded, sites.partition(".")[0], rows, batch_size, steps),
        {name: [row[name] for row in rows] for name in names},
        sites=sites,
        roles=tuple(role or ("mean",)),
        steps=tuple(step) if step else None,
        types=types,
        head=head,  # type: ignore[arg-type]
        seed=seed,
        folder=work,
    )
    sheet.save(out.with_suffix(".safetensors"))
    write_report(probe_report(sheet), out)


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a table; files of images are beside it.

    Raises: FileNotFoundError; InputError for a table without inputs, variables or rows, or without a value.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--table {path}: there is no such file.")
    with path.open(encoding="utf-8", newline="") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    columns = list(rows[0]) if rows else []
    if not {"image", "text", "prompt"} & set(columns) or not set(columns) - {*_INPUTS, _TYPE}:
        raise InputError(
            f"--table {path}: it has the columns {', '.join(map(str, columns)) or 'of no row'}. Image, "
            "text or prompt says what is run; every column but these, seed and type is a variable."
        )
    for number, row in enumerate(rows):
        if None in row or None in row.values() or "" in row.values():
            raise InputError(f"--table {path}: row {number + 1} has not one value for each column.")
        if "image" in row:
            row["image"] = path.parent / row["image"]
            if not row["image"].is_file():
                raise FileNotFoundError(f"--table {path}: row {number + 1}: there is no file {row['image']}.")
    return rows


def inputs_of(
    model: Model, tower: str, rows: list[dict[str, Any]], batch_size: int, steps: int
) -> list[Mapping[str, Any]]:
    """Batches of what a tower of this model reads of the rows.

    Raises: MissingSiteError if there is no such tower; InputError if the rows lack what it reads.
    """
    reads_text = model.check_tower(tower).role in ("text", "language")
    if model.kind == "diffusion":
        needed = {"prompt": "prompt"}
    elif model.kind == "vlm":
        needed = {"images": "image", "text": "text"}
    else:
        needed = {"text": "text"} if reads_text else {"images": "image"}
    missing = [column for column in needed.values() if column not in rows[0]]
    if missing:
        raise InputError(f"{model.name}'s {tower} tower reads a column {missing[0]}, and the table has none.")
    batches = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        batch: dict[str, Any] = {name: [row[column] for row in part] for name, column in needed.items()}
        if model.kind == "diffusion":
            seeds = [int(row.get("seed", start + i)) for i, row in enumerate(part)]
            batch |= {"seed": seeds, "num_inference_steps": steps, "output_type": "latent"}
        batches.append(batch)
    return batches


def _world(model: Model, n: int) -> list[dict[str, Any]]:
    """Scenes of one object of the zoo's world: every sort of input, their truth, and what they are."""
    from mm_adapters.zoo import measures, world
    from mm_adapters.zoo.captions import Claim, phrase_of

    scenes = [world.scene(i, "validation", kind="one") for i in range(n)]
    said = ["size", "colour", "shape", "position"]
    rows = []
    for scene, picture in zip(scenes, measures.images_of(scenes), strict=True):
        text = Claim((phrase_of(scene.things[0], said),), None, None, scene.background).text()
        # The same of every picture, so that it says nothing of the variables.
        question = "<image>\nquestion: what shape is the object? answer:"
        values = {name: measures.value_of(scene, name) for name in measures.ATTRIBUTES}
        read = {"image": picture, "prompt": text, "text": question if model.kind == "vlm" else text}
        rows.append({**read, **values, _TYPE: f"{values['colour']} {values['shape']}"})
    return rows
