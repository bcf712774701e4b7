"""Makes a model of the zoo again from a seed: `python -m mm_adapters.zoo.train tiny-clip`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors import safe_open
from transformers import CLIPModel

from mm_adapters.zoo import NAMES, clip, llava, path, sd
from mm_adapters.zoo._training import device
from mm_adapters.zoo.models_at import load

_ADDED = {"tiny-clip": 4, "tiny-sd": 1}  # Stages that a checkpoint from before them can be trained on with.
_STAGES = {"tiny-clip": clip.STAGES, "tiny-llava": ("tiny-llava",), "tiny-sd": ("vae", "sd-first", "tiny-sd")}


def built_on(name: str, work: Path) -> CLIPModel:
    """The tiny-clip that this model is built on: from before its last stages, which are its own.

    That of a training in `work`, else the shipped one with the tower that the shipped model holds of it.
    """
    folder = work / "tiny-clip" / {"tiny-llava": "joined", "tiny-sd": "polished"}[name]
    if folder.exists():
        return load(folder, "tiny-clip")[0]
    made, holder = load(path("tiny-clip"), "tiny-clip")[0], load(path(name), name)[0]
    if name == "tiny-sd":
        of, held = made.text_model, holder.text_encoder
    else:
        of, held = made.vision_model, holder.model.vision_tower
    # Some versions of transformers nest the tower once more.
    of.load_state_dict({k.split("_model.")[-1]: v for k, v in held.state_dict().items()})
    return made


def history(name: str, work: Path, seed: int, begin: Path | None = None) -> dict[str, object]:
    """What the checkpoints say of how this model was trained; with `begin`, what is said there first."""
    stages = json.loads((begin / "training.json").read_text("utf-8"))["stages"] if begin else {}
    # As it was called before there was a stage after it.
    if begin and name in stages:
        stages[_STAGES[name][-1 - _ADDED[name]]] = stages.pop(name)
    for stage in _STAGES[name][-_ADDED[name] :] if begin else _STAGES[name]:
        folder = work / (stage if name == "tiny-sd" else name)
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
    begin: Annotated[
        Path | None,
        typer.Option(help="A checkpoint as it is before the stages added last, to save the others."),
    ] = None,
) -> None:
    """Trains NAME and writes an ordinary checkpoint to OUT/NAME."""
    if name not in NAMES:
        raise typer.BadParameter(f"no model {name!r}; there is {', '.join(NAMES)}.")
    if threads is not None:
        torch.set_num_threads(threads)
    work = work or out / "work"
    folder = out / name
    if begin is not None and name not in _ADDED:
        raise typer.BadParameter(f"{name} is trained in one stage: there is nothing to begin with.")
    start = load(begin, name)[0] if begin else None
    how: dict[str, Any] = {"steps": steps, "seed": seed, "resume": resume}
    if name == "tiny-clip":
        clip.save(clip.train(work, **how, begin=start), folder)
    elif name == "tiny-llava":
        llava.save(llava.train(work, built_on(name, work), **how), folder)
    else:
        sd.save(sd.train(work, built_on(name, work), **how, begin=start), folder)
    record = json.dumps(history(name, work, seed, begin), indent=2)
    (folder / "training.json").write_text(record, "utf-8")
    typer.echo(str(folder))


if __name__ == "__main__":
    typer.run(main)
