"""Subspaces of a site, trained and untrained, and how often an interchange of each comes true.

Every row of the table is made by `score`: rows differ in where the directions come from, in the labels that
they are trained with, or in the weights of the model, and in nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyvene as pv
import torch
from torch import Tensor

import mm_adapters as mm
from integrations import pyvene as mm_pv
from tests.quality.das_questions import IGNORED, Asked, known, says
from tests.quality.das_tasks import Pairs, Task, ask, pair, renamed, values

TRAINED = "trained (DAS)"
SHUFFLED = "trained with shuffled labels"
CONTROL = "trained for a control task, values renamed"
TWIN = "trained, model of random weights"
COMPONENTS = "principal components"
WITHIN = "principal components within each kind of question"
MEANS = "class means"
RANDOM = "random directions"
WHOLE = "whole vector"
ROWS = (TRAINED, SHUFFLED, CONTROL, TWIN, COMPONENTS, WITHIN, MEANS, RANDOM, WHOLE)
# Without training there is nothing that a seed of it changes, but for what is drawn.
_SEEDLESS = (COMPONENTS, WITHIN, MEANS, WHOLE)


@dataclass(frozen=True)
class Draw:
    """One draw of data: questions about scenes of training, and about others to judge on."""

    number: int
    train: Asked
    train_known: Tensor
    judge: Asked
    judge_known: Tensor

    def with_model(self, model: mm.HookedModel, task: Task, n_scenes: tuple[int, int], split: str) -> Draw:
        """The same questions put to another model; known is what the first one knows."""
        train, judge = _asked(model, task, n_scenes, split, self.number)
        return Draw(self.number, train, self.train_known, judge, self.judge_known)


def draw(model: mm.HookedModel, task: Task, n_scenes: tuple[int, int], split: str, number: int) -> Draw:
    """The draw with this number; `n_scenes` are those of training and those to judge on."""
    train, judge = _asked(model, task, n_scenes, split, number)
    return Draw(number, train, known(model, train), judge, known(model, judge))


def _asked(model: Any, task: Task, n_scenes: tuple[int, int], split: str, number: int) -> tuple[Asked, Asked]:
    train = ask(model, task.name, n_scenes[0], "train", 100 + number)
    return train, ask(model, task.name, n_scenes[1], split, 100 + number)


def random_weights(name: str, seed: int) -> mm.HookedModel:
    """The model with the weights that training begins with: its own class, drawn from this seed."""
    twin = mm.load(name, dtype=torch.float32)
    torch.manual_seed(seed)
    twin.wrapped.load_state_dict(type(twin.wrapped)(twin.wrapped.config).state_dict())
    return twin


@dataclass(frozen=True)
class Effort:
    """How much is trained and judged."""

    steps: int = 200
    n_train: int = 768
    n_judge: int = 192
    lr: float = 2e-2
    batch: int = 32


def score(
    model: mm.HookedModel, task: Task, row: str, data: Draw, seed: int, effort: Effort | None = None
) -> float:
    """Interchange accuracy of one row on held-out pairs, in [0, 1].

    Args:
        model: That `data` was put to: of random weights for the row TWIN.
        task: The variable, the site and the number of directions.
        row: One of ROWS.
        data: A draw of scenes.
        seed: Of training, of the first directions, and of labels that are shuffled or renamed.
        effort: Steps and pairs.
    """
    effort = effort or Effort()
    names = renamed(task.name, seed) if row == CONTROL else None
    train = pair(task.name, data.train, data.train_known, effort.n_train, 2 * data.number, names)
    judge = pair(task.name, data.judge, data.judge_known, effort.n_judge, 2 * data.number + 1, names)
    if row == SHUFFLED:
        train = train.with_shuffled_labels(seed)
    torch.manual_seed(seed)
    made = intervenable(model, task, row)
    if row in (COMPONENTS, WITHIN, MEANS):
        (one,) = made.interventions.values()
        one.rotate_layer.weight = untrained(model, task, row, data.train)
    elif row not in (RANDOM, WHOLE):
        mm_pv.align(
            made,
            train.shuffled_batches(effort.steps, effort.batch, seed),
            loss,
            lr=effort.lr,
            n_steps=effort.steps,
            progress=False,
        )
    return mm_pv.interchange_accuracy(made, judge.batches(), is_right)


def intervenable(model: mm.HookedModel, task: Task, row: str) -> mm_pv.MMIntervenableModel:
    """The interchange of a row, its directions random still."""
    if row == WHOLE:
        one = mm_pv.intervention(model, task.site, pv.VanillaIntervention)
    else:
        # As many class means as there are apart from their own mean.
        rank = min(task.rank, len(values(task.name)) - 1) if row == MEANS else task.rank
        kind = pv.LowRankRotatedSpaceIntervention
        one = mm_pv.intervention(model, task.site, kind, low_rank_dimension=rank)
    return mm_pv.MMIntervenableModel(pv.IntervenableConfig([one]), model)


def untrained(model: mm.HookedModel, task: Task, row: str, asked: Asked) -> Tensor:
    """The directions of a row that is not trained, from the states of these questions, [width, direction]."""
    states = last_states(model, task.site, asked)
    if row == MEANS:
        return class_means(states, _numbers([q.variable for q in asked.questions]))[:, : task.rank]
    if row == WITHIN:
        kinds = _numbers([q.kind for q in asked.questions])
        states = torch.stack(
            [state - states[kinds == kind].mean(0) for state, kind in zip(states, kinds, strict=True)]
        )
    return components(states)[:, : task.rank]


@torch.no_grad()
def last_states(model: mm.HookedModel, site: str, asked: Asked) -> Tensor:
    """The site at each prompt's last token, [question, width]."""
    rows = torch.arange(len(asked.questions)).split(128)
    return torch.cat([model.run(asked.continued(r), read=[site])[site][:, 0] for r in rows])


def components(states: Tensor) -> Tensor:
    """Directions along which states vary, most first, [width, direction]."""
    return torch.linalg.svd(states - states.mean(0), full_matrices=False).Vh.T


def class_means(states: Tensor, classes: Tensor) -> Tensor:
    """Directions between the means of classes, [width, classes - 1]."""
    means = torch.stack([states[classes == c].mean(0) for c in classes.unique()])
    return components(means)[:, : len(means) - 1]


def _numbers(names: list[str]) -> Tensor:
    """Each name's number among them, [name]."""
    different = sorted(set(names))
    return torch.tensor([different.index(name) for name in names])


def loss(output: Any, batch: Mapping[str, Any]) -> Tensor:
    """How unexpected the tokens of the labels are."""
    logits, targets = output.logits.flatten(0, 1), batch["targets"].flatten()
    return torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED)


def is_right(output: Any, batch: Mapping[str, Any]) -> Tensor:
    """Whether the whole label is said, [row]."""
    return says(output.logits, batch["targets"])


def chance(judge: Pairs) -> float:
    """How often the commonest label of its kind of question is right."""
    kinds = [judge.asked.questions[int(i)].kind for i in judge.base]
    by_kind = {k: [x for x, kind in zip(judge.labels, kinds, strict=True) if kind == k] for k in set(kinds)}
    return sum(max(map(labels.count, labels)) for labels in by_kind.values()) / len(judge)


def seeds_of(row: str, n_seeds: int) -> range:
    """The seeds that a row is made with: one where nothing is drawn or trained."""
    return range(1 if row in _SEEDLESS else n_seeds)
