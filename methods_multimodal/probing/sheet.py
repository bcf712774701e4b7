"""How much each place of a model says about each variable, beside what its nulls say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import scipy.stats
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from methods_multimodal.core.record import Record
from methods_multimodal.core.statistics import Estimate, bootstrap
from mm_adapters import InputError

Kind = Literal["task", "shuffled", "control", "twin"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class ProbeSheet(Record):
    """Which test rows each probe got right: [kind, variable, layer, role, step, row].

    `kinds` are "task", "shuffled" (labels on other rows), "control" (a random label for each type of row, if
    types were given) and "twin" (the same model untrained, or with shuffled weights, if there was one).
    `validation` is each probe's accuracy on the rows that chose its strength, of tasks and twins; `strength`
    the task's. `guess[variable]` is how often the class that is commonest in training is right on the test
    rows. `steps` is empty outside sampling loops, and the axis then has one place.
    """

    right: Bool[Tensor, "kind variable layer role step row"]
    validation: Float[Tensor, "kind variable layer role step"]
    strength: Float[Tensor, "variable layer role step"]
    guess: Float[Tensor, " variable"]
    kinds: tuple[Kind, ...]
    variables: tuple[str, ...]
    classes: tuple[tuple[str, ...], ...]
    sites: tuple[str, ...]
    roles: tuple[str, ...]
    steps: tuple[int, ...]
    head: str
    model: str

    def accuracy(self, kind: Kind = "task") -> Float[Tensor, "variable layer role step"]:
        """The share of test rows that are right. Raises: InputError for a kind that was not measured."""
        return self.right[self._kind(kind)].double().mean(-1)

    def interval(
        self, kind: Kind = "task", level: float = 0.95
    ) -> Float[Tensor, "bound variable layer role step"]:
        """Wilson's interval of each accuracy, over the test rows. Raises: as `accuracy`."""
        counts = self.right[self._kind(kind)].sum(-1)
        n = self.right.shape[-1]
        bounds = {}
        for count in counts.unique().tolist():
            ends = scipy.stats.binomtest(count, n).proportion_ci(level, "wilson")
            bounds[count] = (float(ends.low), float(ends.high))
        flat = torch.tensor([bounds[count] for count in counts.flatten().tolist()], dtype=torch.float64)
        return flat.T.reshape(2, *counts.shape)

    @property
    def selectivity(self) -> Float[Tensor, "variable layer role step"]:
        """Accuracy less that on the control task: what is in the vectors rather than learned by heart.

        Source: Hewitt and Liang 2019, arXiv 1909.03368, section 2.2.
        Raises: InputError if no types were given.
        """
        return self.accuracy() - self.accuracy("control")

    def above(
        self,
        than: Kind,
        variable: str,
        *,
        layer: int,
        role: str,
        step: int | None = None,
        n_resamples: int = 2000,
        seed: int = 0,
    ) -> Estimate:
        """How far the task's accuracy is above a null's at one place, with the interval over test rows.

        The rows are paired. Raises: InputError for what is not in the sheet.
        """
        at = (self._variable(variable), layer, self._role(role), self._step(step))
        own, other = (self.right[self._kind(kind)][at].double() for kind in ("task", than))
        return bootstrap(own[:, None], than=other[:, None], n_resamples=n_resamples, rng=seed)

    def best_layer(
        self, variable: str, role: str, step: int | None = None, kind: Literal["task", "twin"] = "task"
    ) -> int:
        """The layer whose probe is best on validation rows, the first of equals: the test rows do not choose.

        Raises: InputError for what is not in the sheet.
        """
        at = (self._variable(variable), slice(None), self._role(role), self._step(step))
        return int(self.validation[self._kind(kind)][at].argmax())

    def curve(
        self, variable: str, role: str, step: int | None = None, kind: Kind = "task"
    ) -> tuple[Float[Tensor, " layer"], Float[Tensor, "bound layer"]]:
        """Accuracy by layer, and its interval. Raises: InputError for what is not in the sheet."""
        at = (self._variable(variable), slice(None), self._role(role), self._step(step))
        return self.accuracy(kind)[at], self.interval(kind)[(slice(None), *at)]

    def _kind(self, kind: str) -> int:
        if kind == "control" and kind not in self.kinds:
            raise InputError("No control task was run: give probe() the rows' `types`.")
        return _index("kind", kind, self.kinds)

    def _variable(self, name: str) -> int:
        return _index("variable", name, self.variables)

    def _role(self, name: str) -> int:
        return _index("role", name, self.roles)

    def _step(self, step: int | None) -> int:
        if step is None and len(self.steps) <= 1:
            return 0
        return _index("step", step, self.steps)


def _index(what: str, asked: object, known: tuple[object, ...]) -> int:
    if asked not in known:
        raise InputError(f"No {what} {asked!r} here; there is {', '.join(map(str, known)) or 'none'}.")
    return known.index(asked)
