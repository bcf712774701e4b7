"""Makes a model of the zoo again from a seed: `python -m mm_adapters.zoo.train tiny-clip`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors import safe_open
from transformers import CLIPModel

from mm_adapters.zoo import NAMES, clip, llava, path, sd
from mm_adapters.zoo._training import device

_STAGES = {"tiny-clip": clip.STAGES, "tiny-llava": ("tiny-llava",), "tiny-sd": ("vae", "tiny-sd")}


def eyes(out: Path) -> CLIPModel:
    """The tiny-clip that the other two are built on: the one in `out`, else the one shipped."""
    folder = out / "tiny-clip"
    folder = folder if folder.exists() else path("tiny-clip")
    return CLIPModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def history(name: str, work: Path, seed: int) -> dict[str, object]:
    """What the checkpoints say of how this model was trained."""
    stages = {}
    for stage in _STAGES[name]:
        folder = work / ("vae" if stage == "vae" else name)
        with safe_open(folder / f"{stage}.safetensors", framework="pt") as file:
            stages[stage] = json.loads(file.metadata()["run"])
    return {"seed": seed, "threads": torch.get_num_threads(), "device": str(device()), "stages": stages}


def main(
    name: Annotated[str, typer.Argument(help="One of: " + ", ".join(NAMES))],
    steps: Annotated[int | None, typer.Option(help="Instead of the model's own number.")] = None,
    out: Annotated[Path, typer.Option(help="The checkpoint goes to OUT/NAME.")] = Path("zoo"),
    work: Annotated[Path | None, typer.Option(help="Where a run keeps its state.")] = None,
    seed: int = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    resume: Annotated[bool, typer.Option(help="Continue a run that was killed.")] = False,
) -> None:
    """Trains NAME and writes an ordinary checkpoint to OUT/NAME."""
    if name not in NAMES:
        raise typer.BadParameter(f"no model {name!r}; there is {', '.join(NAMES)}.")
    if threads is not None:
        torch.set_num_threads(threads)
    work = work or out / "work"
    folder = out / name
    if name == "tiny-clip":
        clip.save(clip.train(work, steps=steps, seed=seed, resume=resume), folder)
    elif name == "tiny-llava":
        llava.save(llava.train(work, eyes(out), steps=steps, seed=seed, resume=resume), folder)
    else:
        sd.save(sd.train(work, eyes(out), steps=steps, seed=seed, resume=resume), folder)
    (folder / "training.json").write_text(json.dumps(history(name, work, seed), indent=2), "utf-8")
    typer.echo(str(folder))


if __name__ == "__main__":
    typer.run(main)
