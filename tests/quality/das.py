"""In which directions does tiny-llava keep what it is asked? DAS beside directions that are not trained.

python -m tests.quality.das [model] [--task "object asked"] [--draws 3] [--seeds 3] [--steps 200]
python -m tests.quality.das [model] --choose [--task "object asked"]

Interchange accuracy on held-out pairs: how often the base's whole answer, with the subspace of its last
token's state taken from the source, is what it would be with the source's value. Two tasks (`das_tasks`): the
colour asked about, for which principal components suffice; and which object is asked about while what is
asked about it stays. Every row is the same function (`das_subspaces.score`) with other directions, labels or
weights: its mean over seeds of training and draws of data, and the lowest and highest of them.

Pairs are of questions that the model answers rightly, each by its whole answer. `--choose` looks through
sites and numbers of directions on scenes of the split "validation"; the table judges on "test".
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

import mm_adapters as mm
from mm_adapters.zoo import world
from tests.quality import das_subspaces as subspaces
from tests.quality.das_subspaces import COMPONENTS, RANDOM, ROWS, TRAINED, TWIN, Effort, score
from tests.quality.das_tasks import COLOUR, OBJECT, TASKS, Task, ask, pair

# Scenes of training, and scenes to judge on: a scene of two objects is asked about six times.
SCENES = {COLOUR.name: (384, 160), OBJECT.name: (160, 64)}
# What `--choose` looks through.
SITES = (
    "language.blocks.0.hook_attn_out",
    "language.blocks.0.hook_resid_post",
    "language.blocks.1.hook_attn_out",
)
RANKS = (4, 8, 16)
# Of the trained row at least, of principal components and of random directions less than.
AIMS = {OBJECT.name: (0.9, 0.6, 0.3)}


@dataclass(frozen=True)
class Row:
    """A row of the table: its accuracy in each run, by (draw, seed)."""

    name: str
    runs: dict[tuple[int, int], float]

    @property
    def mean(self) -> float:
        """Over all runs."""
        return sum(self.runs.values()) / len(self.runs)

    def __str__(self) -> str:
        low, high = min(self.runs.values()), max(self.runs.values())
        return f"{self.name:<52} {self.mean:6.1%}  {low:6.1%} to {high:6.1%}  {len(self.runs):3d} runs"


def table(
    name: str, task: Task, n_draws: int, n_seeds: int, effort: Effort, rows: Sequence[str] = ROWS
) -> list[Row]:
    """Each row of a task on the split "test", and what guessing the commonest answer reaches.

    Args:
        name: The model's name or folder.
        task: What is moved, where, in how many directions.
        n_draws: Draws of scenes to train and to judge on.
        n_seeds: Seeds of training for each draw.
        effort: Steps and pairs.
        rows: Which of ROWS.
    """
    model = mm.load(name, dtype=torch.float32)
    guess, found = Row("the commonest answer, said always", {}), [Row(row, {}) for row in rows]
    for draw in range(n_draws):
        data = subspaces.draw(model, task, SCENES[task.name], "test", draw)
        judge = pair(task.name, data.judge, data.judge_known, effort.n_judge, 2 * draw + 1)
        guess.runs[draw, 0] = subspaces.chance(judge)
        print(f"draw {draw}: {float(data.judge_known.float().mean()):.1%} of questions answered", flush=True)
        for row in found:
            for seed in subspaces.seeds_of(row.name, n_seeds):
                one, seen = model, data
                if row.name == TWIN:
                    one = subspaces.random_weights(name, seed)
                    seen = data.with_model(one, task, SCENES[task.name], "test")
                row.runs[draw, seed] = score(one, task, row.name, seen, seed, effort)
    return [*found, guess]


def pairs(
    model: mm.HookedModel, n: int, split: str, size: int, seed: int
) -> tuple[list[dict[str, Any]], torch.Tensor]:
    """Batches of pairs of "colour asked", and the token with which each colour's answer begins, [colour].

    Args:
        model: Asked once about each of `n` scenes.
        n: Scenes, and so pairs at most.
        split: Of the scenes.
        size: Pairs of a batch; the last has what is left.
        seed: Of the scenes, and of which are paired.
    """
    asked = ask(model, COLOUR.name, n, split, seed)
    made = pair(COLOUR.name, asked, subspaces.known(model, asked), n, seed)
    return list(made.batches(size)), asked.targets(list(world.COLOURS))[:, 0]


def choose(name: str, task: Task, effort: Effort) -> None:
    """Prints trained, principal and random directions at each site and rank, on the split "validation"."""
    model = mm.load(name, dtype=torch.float32)
    data = subspaces.draw(model, task, SCENES[task.name], "validation", 0)
    print(f"{len(SITES) * len(RANKS)} settings, one draw, one seed")
    for site in SITES:
        for rank in RANKS:
            at = replace(task, site=site, rank=rank)
            rows = {row: score(model, at, row, data, 0, effort) for row in (TRAINED, COMPONENTS, RANDOM)}
            print(site, rank, *(f"{row} {value:.1%}" for row, value in rows.items()), flush=True)


def missed(task: Task, rows: Sequence[Row]) -> list[str]:
    """What of a task's aims is not reached."""
    if task.name not in AIMS:
        return []
    means = {row.name: row.mean for row in rows}
    least, components, random = AIMS[task.name]
    return [
        f"{name} {means[name]:.1%}, aim {word} {aim:.0%}"
        for name, word, aim, ok in (
            (TRAINED, "at least", least, means[TRAINED] >= least),
            (COMPONENTS, "less than", components, means[COMPONENTS] < components),
            (RANDOM, "less than", random, means[RANDOM] < random),
        )
        if not ok
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny-llava", help="a name of the zoo, or a folder")
    parser.add_argument("--task", choices=list(TASKS), action="append")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=Effort().steps)
    parser.add_argument("--choose", action="store_true", help="print settings on validation, and stop")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    effort, failed = replace(Effort(), steps=options.steps), False
    for name in options.task or TASKS:
        task = TASKS[name]
        if options.choose:
            choose(options.model, task, effort)
            continue
        rows = table(options.model, task, options.draws, options.seeds, effort)
        print(f"\n{name}: {task.rank} directions of {task.site}, {effort.steps} steps")
        print(*rows, sep="\n")
        misses = missed(task, rows)
        failed |= bool(misses)
        print("ok" if not misses else "MISSED: " + "; ".join(misses))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
