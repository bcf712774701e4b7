"""Trains the small model on its whole training set, on random halves, and without what scorers name.

    python -m tests.retraining.subsets --work FOLDER

Every run writes one file into the folder, so a script that was killed goes on where it was. What tests
need of them is then written beside this script: `truth.safetensors` (subsets, losses, queries, what was
left out), `model.safetensors` (the weights of the full models, fp16) and, of a training set of its own,
`faded.safetensors` (see `tests.retraining.faded`). About ten seconds a run on one core.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from tests.retraining.model import STEPS, draw, losses, train
from tests.retraining.pictures import (
    N_TRAIN,
    Pictures,
    held_out_pictures,
    planted_pictures,
    planted_queries,
    training_pictures,
)

N_SUBSETS = 64
SHARE = 0.5
# Full models; and the first subsets again with another seed, which says what a seed alone changes.
SEEDS = (0, 1, 2)
N_REPEATED = 6
# Models whose weights are shipped.
KEPT = (*(f"full-{seed}" for seed in SEEDS), "planted")
# Queries whose top examples are left out, one of each of four colours: new pictures, then what the model
# drew of the same words; and how many are left out.
LEFT_OUT_QUERIES = (0, 8, 16, 20, 24, 32, 40, 44)
LEFT_OUT_SHARE = 0.1
# What a background is, is learned long before single pictures are: later, a query's background comes from
# the one or two pictures most like it, and the rest of its sources are no sources any more.
PLANTED_STEPS = STEPS // 4


@dataclass(frozen=True)
class Job:
    """One training run: on which pictures, with which seed."""

    name: str
    which: tuple[int, ...]
    seed: int = 0
    planted: bool = False


def subsets() -> Tensor:
    """Which training pictures each subset has, [subset, picture]: random halves."""
    found = torch.zeros(N_SUBSETS, N_TRAIN, dtype=torch.bool)
    for number in range(N_SUBSETS):
        lots = torch.Generator().manual_seed(10_000 + number)
        found[number, torch.randperm(N_TRAIN, generator=lots)[: int(N_TRAIN * SHARE)]] = True
    return found


def planted_sources() -> Tensor:
    """Which pictures of the planted training set have each planted query's background, [query, picture]."""
    known, asked = planted_pictures().said, planted_queries().said
    return torch.tensor([[one[2] == query[2] for one in known] for query in asked])


def jobs() -> list[Job]:
    """The runs that need no scorer, the full model first."""
    everything = tuple(range(N_TRAIN))
    halves = [tuple(row.nonzero()[:, 0].tolist()) for row in subsets()]
    found = [Job(f"full-{seed}", everything, seed) for seed in SEEDS]
    found += [Job(f"half-{i}", half) for i, half in enumerate(halves[:N_REPEATED])]
    found += [Job(f"again-{i}", half, 1) for i, half in enumerate(halves[:N_REPEATED])]
    found += [Job(f"half-{i}", half) for i, half in enumerate(halves) if i >= N_REPEATED]
    gone = planted_sources().any(0)
    found += [Job("planted", everything, planted=True)]
    return [*found, Job("planted-without", tuple((~gone).nonzero()[:, 0].tolist()), planted=True)]


def left_out_jobs(removed: dict[str, Tensor]) -> list[Job]:
    """One run for each query, method and seed, without the pictures the method names.

    `removed[method]` is [query, picture], or [seed, picture] for "random", which all queries share.
    """
    found = []
    for method, rows in removed.items():
        for number, row in enumerate(rows):
            kept = tuple(sorted(set(range(N_TRAIN)) - set(row.tolist())))
            for seed in SEEDS if method != "random" else (SEEDS[number],):
                found.append(Job(f"without-{method}-{number}-{seed}", kept, seed))
    return found


def run(pending: Sequence[Job], work: Path) -> None:
    """Trains what is not there yet, and writes the losses of every query and training picture."""
    work.mkdir(parents=True, exist_ok=True)
    todo = [job for job in pending if not (work / f"{job.name}.safetensors").is_file()]
    with tqdm(total=len(pending), initial=len(pending) - len(todo), desc="training runs", unit="run") as bar:
        for job in todo:
            known = planted_pictures() if job.planted else training_pictures()
            model = train(known, job.which, job.seed, PLANTED_STEPS if job.planted else STEPS)
            if job.name in KEPT:
                state = {name: value.half() for name, value in model.state_dict().items()}
                # What is shipped is what is measured.
                model.load_state_dict({name: value.float() for name, value in state.items()})
                write(state, work / f"weights-{job.name}.safetensors")
            if job.name in ("full-0", "planted"):
                asked = planted_queries() if job.planted else held_out_pictures()
                write({"images": _bytes(draw(model, asked.words()))}, work / f"drawn-{job.name}.safetensors")
            queries = all_queries(
                load_file(work / f"drawn-{'planted' if job.planted else 'full-0'}.safetensors")["images"],
                job.planted,
            )
            measured = {"queries": losses(model, queries), "training": losses(model, known, noises=1)}
            write(measured, work / f"{job.name}.safetensors")
            bar.update()


def all_queries(drawn: Tensor, planted: bool = False) -> Pictures:
    """New pictures, then as many that the full model drew of the same words (given as bytes)."""
    held_out = planted_queries() if planted else held_out_pictures()
    made = drawn.float().div(127.5).sub(1.0)
    return Pictures(torch.cat([held_out.images, made]), held_out.said * 2)


def collect(work: Path, removed: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the runs found, by the names `tests.retraining.truth.Truth` reads."""

    def stacked(names: Sequence[str], what: str = "queries") -> Tensor:
        return torch.stack([load_file(work / f"{name}.safetensors")[what] for name in names])

    halves, full = [f"half-{i}" for i in range(N_SUBSETS)], [f"full-{seed}" for seed in SEEDS]
    found = {
        "subsets": subsets(),
        "losses": stacked(halves),
        "training_losses": stacked(halves, "training"),
        "again": stacked([f"again-{i}" for i in range(N_REPEATED)]),
        "full": stacked(full),
        "full_training": stacked(full, "training"),
        "drawn": load_file(work / "drawn-full-0.safetensors")["images"],
        "planted_drawn": load_file(work / "drawn-planted.safetensors")["images"],
        "planted": stacked(["planted", "planted-without"]),
    }
    for method, rows in removed.items():
        found[f"removed/{method}"] = rows.to(torch.int16)
        shared = method == "random"
        names = [
            [f"without-{method}-{s if shared else q}-{seed}" for s, seed in enumerate(SEEDS)]
            for q in range(len(LEFT_OUT_QUERIES))
        ]
        found[f"without/{method}"] = torch.stack(
            [stacked(each)[:, query] for each, query in zip(names, LEFT_OUT_QUERIES, strict=True)]
        )
    return found


def _bytes(images: Tensor) -> Tensor:
    return ((images + 1) * 127.5).round().clamp(0, 255).byte()


def write(tensors: dict[str, Tensor], path: Path, about: dict[str, str] | None = None) -> None:
    """A file that is there whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    save_file({name: value.contiguous() for name, value in tensors.items()}, part, metadata=about)
    os.replace(part, path)


def main(argv: Sequence[str] | None = None) -> None:
    """The runs that need no scorer, what scorers name, the runs without it, and the three files."""
    from tests.retraining import faded
    from tests.retraining.scores import named
    from tests.retraining.truth import FOLDER, Truth, about

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="where each run's file goes")
    parser.add_argument("--out", type=Path, default=FOLDER, help="where the three files go")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    work: Path = options.work
    run(jobs(), work)
    weights = {
        f"{name}/{key}": value
        for name in KEPT
        for key, value in load_file(work / f"weights-{name}.safetensors").items()
    }
    write(weights, options.out / "model.safetensors")
    write(collect(work, {}), options.out / "truth.safetensors", about())
    picks = work / "removed.safetensors"
    if not picks.is_file():
        write(named(Truth.read(options.out)), picks)
    removed = load_file(picks)
    run(left_out_jobs(removed), work)
    write(collect(work, removed), options.out / "truth.safetensors", about())
    write(faded.make(work), options.out / "faded.safetensors", about())


if __name__ == "__main__":
    main()
