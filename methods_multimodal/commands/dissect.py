"""`mm-interp dissect`: which concept each unit of a site detects, as a page a person can read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from methods_multimodal.commands.options import (
    BatchSize,
    Device,
    ModelName,
    SkipUnreadable,
    check_folder,
    open_model,
)
from mm_adapters import InputError, Model


def dissect(
    images: Annotated[Path, typer.Option(help="A folder of pictures.")],
    site: Annotated[str, typer.Option(help="Whose units; mm-interp sites MODEL lists them.")],
    model: ModelName = "tiny-clip",
    masks: Annotated[
        Path | None, typer.Option(help="A folder of index maps with a legend.json, or a COCO file.")
    ] = None,
    concepts: Annotated[
        Path | None, typer.Option(help="A concept a line, its category before a tab. Default: the masks'.")
    ] = None,
    judge: Annotated[
        str, typer.Option(help="A model of images and texts that says what pictures show.")
    ] = "tiny-clip",
    template: Annotated[
        str, typer.Option(help="A sentence around a concept, for the judge.")
    ] = "a photo of {}",
    question: Annotated[str, typer.Option(help="For a model that answers questions.")] = "what is this?",
    cards: Annotated[int, typer.Option(min=1, help="How many units get a card.")] = 48,
    twins: Annotated[
        int, typer.Option(min=0, help="How often the same is asked of the tower with its weights shuffled.")
    ] = 1,
    batch: BatchSize = 32,
    skip_unreadable: SkipUnreadable = False,
    device: Device = None,
    out: Annotated[Path, typer.Option(help="A folder: index.html, units.json, units.csv.")] = Path(
        "dissection"
    ),
) -> None:
    """Names every unit of a site, says how sure that is, and writes a page of it.

    A run that was killed goes on where it was, if it is started again with the same --out.
    """
    from methods_multimodal.dissection.concepts import read_concepts
    from methods_multimodal.dissection.masks import read_masks
    from mm_adapters.inputs.images import image_files, readable_files

    check_folder(out)
    found = image_files(images, recursive=False, verify=not skip_unreadable)
    files, skipped = readable_files(found, skip_unreadable=skip_unreadable)
    for path, why in skipped:
        typer.echo(f"skipped {path}: {why}")
    if masks is None and concepts is None:
        raise InputError("Give --masks (names and where they are), --concepts (names), or both.")
    labelled, known = (None, None) if masks is None else read_masks(masks, files)
    listed = read_concepts(concepts) if concepts is not None else known
    assert listed is not None
    if labelled is not None and known is not None and concepts is not None:
        unknown = sorted(set(known.names) - set(listed.names))
        if unknown:
            raise InputError(f"{concepts} lacks {', '.join(unknown[:6])}, which the masks have. Add them.")

    from methods_multimodal.dissection.units import Units
    from mm_adapters.store import exclusive

    loaded = open_model(model, device)
    units = Units(loaded, site)
    parts = [files[i : i + batch] for i in range(0, len(files), batch)]
    batches = [(_inputs(loaded, part, question), part) for part in parts]
    with exclusive(out):
        judged_by = open_model(judge, device)
        _write(
            units,
            batches,
            loaded,
            judged_by,
            listed,
            labelled,
            template,
            question,
            cards,
            twins,
            files,
            out,
            model,
        )


def _write(
    units: Any,
    batches: Sequence[Any],
    loaded: Model,
    judge: Model,
    listed: Any,
    labelled: Any,
    template: str,
    question: str,
    cards: int,
    n_twins: int,
    files: Sequence[Path],
    out: Path,
    model: str,
) -> None:
    from methods_multimodal.dissection.concepts import presence
    from methods_multimodal.dissection.shuffled_weights import twins_of
    from methods_multimodal.dissection.survey import survey
    from methods_multimodal.report.dissection import strongest, write_page

    results = survey(
        units,
        batches,
        judge,
        listed,
        out / "activations",
        masks=labelled,
        template=template,
        twins=twins_of(units, n_twins),
    )
    maps: dict[int, list[Any]] = {}
    units_shown = strongest(results, cards)
    numbers = sorted({int(i) for unit in units_shown for i in results.top[unit, :5]})
    by_number = {}
    for number in numbers:
        by_number[number] = units.maps(_inputs(loaded, [files[number]], question))[0]
    for unit in units_shown:
        maps[unit] = [(int(i), by_number[int(i)][unit]) for i in results.top[unit, :5]]
    written = write_page(
        results,
        out,
        model=model,
        pictures=files,
        maps=maps,
        thresholds=None if results.network is None else results.network.thresholds,
        shown=None if labelled is None else presence(labelled, listed),
    )
    for one in results.methods:
        kept = one.chance.significant()
        said = f"{one.method}: {len(kept)} of {len(one.names)} units better than chance"
        if results.twins:
            at_random = [len(twin.by_name(one.method).chance.significant()) for twin in results.twins]
            said += (
                f" (with shuffled weights {', '.join(map(str, at_random))}); "
                f"{len(results.above_random(one.method))} above what 1 % of shuffled units reach"
            )
        typer.echo(said)
    typer.echo(f"wrote {', '.join(map(str, written))}")


def _inputs(model: Model, pictures: Sequence[Any], question: str) -> Mapping[str, Any]:
    """The model's inputs for these pictures, with whatever text it cannot do without."""
    roles = {tower.role for tower in model.towers.values()}
    if "language" in roles:
        return {"images": list(pictures), "text": [question] * len(pictures)}
    # A dual tower's forward wants a text; which one does not matter to the other tower.
    return {"images": list(pictures), **({"text": ["a"]} if "text" in roles else {})}
