"""Measures the zoo's models and writes their cards: `python -m mm_adapters.zoo.evaluate [NAME ...]`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mm_adapters.zoo import NAMES, cards, path
from mm_adapters.zoo.drawing import measure_sd
from mm_adapters.zoo.measures import Measure, measure_clip, measure_llava
from mm_adapters.zoo.models_at import load

_FULL = {"tiny-clip": 2000, "tiny-llava": 2000, "tiny-sd": 300}
_QUICK = {"tiny-clip": 200, "tiny-llava": 150, "tiny-sd": 16}


def measure(name: str, folder: Path, n: int) -> list[Measure]:
    """All that is measured of one model."""
    model, processor = load(folder, name)
    if name == "tiny-clip":
        return measure_clip(model, processor, n)
    if name == "tiny-llava":
        return measure_llava(model, processor, n)
    clip_folder = folder.parent / "tiny-clip"
    clip, clip_processor = load(clip_folder if clip_folder.exists() else path("tiny-clip"), "tiny-clip")
    return measure_sd(model, clip, clip_processor, n)


def main(
    names: Annotated[list[str] | None, typer.Argument(help="All of them if none is named.")] = None,
    quick: Annotated[bool, typer.Option(help="Few samples, and no card is written.")] = False,
    models: Annotated[
        Path | None, typer.Option(help="Where the checkpoints lie, if not in the package.")
    ] = None,
) -> None:
    """Prints a table; exits with 1 if a model misses one of its bounds."""
    missed = 0
    for name in names or NAMES:
        if name not in NAMES:
            raise typer.BadParameter(f"no model {name!r}; there is {', '.join(NAMES)}.")
        folder = models / name if models else path(name)
        measured = measure(name, folder, (_QUICK if quick else _FULL)[name])
        typer.echo(f"\n{name}")
        for one in measured:
            mark = "" if one.passes() else "  MISSED"
            typer.echo(f"  {one.value:8.2%}  n={one.n:<5d} {one.bound():8s} {one.name}{mark}")
            missed += not one.passes()
        if not quick:
            facts = [asdict(one) for one in measured]
            (folder / "metrics.json").write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
            cards.write(name, folder, measured)
    raise typer.Exit(1 if missed else 0)


if __name__ == "__main__":
    typer.run(main)
