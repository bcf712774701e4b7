"""Trains the small model on the whole training set, on random halves of it, and without what scorers blame.

    python -m tests.retraining.subsets --work FOLDER [--out tests/retraining]

Every run writes one file into the folder, so a run that was killed goes on where it was. At the end the
files become two: `truth.safetensors` (losses, subsets, queries) and `model.safetensors` (weights, fp16).
About 25 seconds a run on one core.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from tests.retraining.model import draw, losses, train
from tests.retraining.pictures import (
    N_TRAIN,
    Pictures,
    held_out_pictures,
    training_pictures,
)

N_SUBSETS = 64
SHARE = 0.5
# Full models; and the first subsets again with another seed, which says what a seed alone changes.
SEEDS = (0, 1, 2)
N_REPEATED = 6
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Job:
    """One training run: on which pictures, with which seed."""

    name: str
    which: tuple[int, ...]
    seed: int


def subsets() -> Tensor:
    """Which training pictures each subset has, [subset, picture]: random halves."""
    found = torch.zeros(N_SUBSETS, N_TRAIN, dtype=torch.bool)
    for number in range(N_SUBSETS):
        lots = torch.Generator().manual_seed(10_000 + number)
        found[number, torch.randperm(N_TRAIN, generator=lots)[: int(N_TRAIN * SHARE)]] = True
    return found


def jobs() -> list[Job]:
    """The runs that need no scorer, the base model first."""
    everything = tuple(range(N_TRAIN))
    halves = [tuple(row.nonzero()[:, 0].tolist()) for row in subsets()]
    found = [Job("full-0", everything, 0)]
    found += [Job(f"half-{i}", half, 0) for i, half in enumerate(halves[:N_REPEATED])]
    found += [Job(f"again-{i}", half, 1) for i, half in enumerate(halves[:N_REPEATED])]
    found += [Job(f"full-{seed}", everything, seed) for seed in SEEDS[1:]]
    return found + [Job(f"half-{i}", half, 0) for i, half in enumerate(halves) if i >= N_REPEATED]


def run(pending: Sequence[Job], work: Path) -> None:
    """Trains what is not there yet, and writes the losses of every query and training picture."""
    work.mkdir(parents=True, exist_ok=True)
    known = training_pictures()
    todo = [job for job in pending if not (work / f"{job.name}.safetensors").is_file()]
    with tqdm(total=len(pending), initial=len(pending) - len(todo), desc="training runs", unit="run") as bar:
        for job in todo:
            halfway: dict[str, Tensor] | None = {} if job.name == "full-0" else None
            model = train(known, job.which, job.seed, halfway)
            if halfway is not None:
                halved = {
                    f"{part}/{name}": value.half()
                    for part, state in (("half", halfway), ("full", model.state_dict()))
                    for name, value in state.items()
                }
                _write(halved, work / "model.safetensors")
                # What is shipped is what is measured.
                model.load_state_dict({name: v.half().float() for name, v in model.state_dict().items()})
                made = draw(model, held_out_pictures().words())
                _write({"images": _bytes(made)}, work / "generated.safetensors")
            queries = all_queries(work / "generated.safetensors")
            measured = {"queries": losses(model, queries), "training": losses(model, known, noises=1)}
            _write(measured, work / f"{job.name}.safetensors")
            bar.update()


def all_queries(generated: Path) -> Pictures:
    """The held-out pictures, then as many that the base model drew of the same words."""
    held_out = held_out_pictures()
    made = load_file(generated)["images"].float().div(127.5).sub(1.0)
    return Pictures(torch.cat([held_out.images, made]), held_out.said * 2)


def _bytes(images: Tensor) -> Tensor:
    return ((images + 1) * 127.5).round().clamp(0, 255).byte()


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    part = path.with_name(f"{path.name}.part")
    save_file({name: value.contiguous() for name, value in tensors.items()}, part)
    os.replace(part, path)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where each run's file goes")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    run(jobs(), options.work)


if __name__ == "__main__":
    main()
