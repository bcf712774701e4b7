"""What every lens gives: scores of candidates after each layer, at chosen positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from methods_multimodal.core.record import Record
from mm_adapters import InputError

Patch = tuple[int, int]


@dataclass(frozen=True)
class LensReading(Record):
    """Scores by position, layer and candidate: a word, a text, a label.

    Positions of all rows stand one after the other: entry i is position `positions[i]` of row `rows[i]`, and
    shows `patches[i]` of a grid (None if it is no patch). `total` is the logarithm of the sum of all
    candidates' exponentials, also of those that were not kept; None where scores are no logits.

    Attributes:
        scores: [position, layer, candidate].
        total: [position, layer].
        lens: Which lens it is: "logit", "tuned", "contextual", ...
        unit: What a score is: "logit", "cosine", ...
        layers: What each layer is called.
        candidates: What each candidate is called; empty where they are a whole vocabulary, by id.
        rows, positions, patches: What each entry of the first axis is.
        grid: How many patches there are, down and across; None where entries are no one image's.
        where: What was asked for, in words.
        own_gap: How far the last layer is from what the model itself says, at most; None if it need not be.
    """

    scores: Float[Tensor, "position layer candidate"]
    total: Float[Tensor, "position layer"] | None
    lens: str
    unit: str
    layers: tuple[str, ...]
    candidates: tuple[str, ...]
    rows: tuple[int, ...]
    positions: tuple[int, ...]
    patches: tuple[Patch | None, ...] = ()
    grid: Patch | None = None
    where: str = ""
    own_gap: float | None = None

    @property
    def logits(self) -> Float[Tensor, "position layer candidate"]:
        """The scores of a lens that gives logits. Raises: InputError for one that gives anything else."""
        if self.total is None:
            raise InputError(f"The {self.lens} lens gives a {self.unit}, which is no logit: read `scores`.")
        return self.scores

    @property
    def probabilities(self) -> Float[Tensor, "position layer candidate"]:
        """Each candidate's probability among all there are. Raises: InputError if scores are no logits."""
        if self.total is None:
            raise InputError(
                f"The {self.lens} lens gives a {self.unit}, which is no logit: read `scores`, or `shares`."
            )
        return (self.scores - self.total[..., None]).exp()

    @property
    def shares(self) -> Float[Tensor, "position layer candidate"]:
        """The softmax over the candidates that were kept, of scores of any unit."""
        return self.scores.softmax(-1)

    def name(self, candidate: int) -> str:
        """What a candidate is called."""
        return self.candidates[candidate] if self.candidates else f"token {candidate}"

    def top(self, k: int = 5, entry: int = 0) -> tuple[Float[Tensor, "layer k"], Int[Tensor, "layer k"]]:
        """Each layer's strongest candidates at one entry: probabilities (or scores), and their numbers."""
        values = self.scores[entry] if self.total is None else self.probabilities[entry]
        best, numbers = values.topk(min(k, values.shape[-1]), -1)
        return best, numbers

    def of_row(self, row: int) -> LensReading:
        """The entries of one row of the batch. Raises: InputError if there are none."""
        return self._kept([i for i, r in enumerate(self.rows) if r == row], f"row {row}")

    def entry(self, row: int, position: int) -> int:
        """The number of an entry. Raises: InputError if it was not read."""
        for i, at in enumerate(zip(self.rows, self.positions, strict=True)):
            if at == (row, position):
                return i
        raise InputError(
            f"Position {position} of row {row} was not read; there are {len(self.rows)} entries."
        )

    def mini_map(self, candidate: int, layer: int = -1, row: int = 0) -> Float[Tensor, "down across"]:
        """One candidate's probabilities (or scores) over an image's patches; NaN at patches not read.

        Raises: InputError if no entry of the row is a patch of one grid.
        """
        if self.grid is None:
            raise InputError("These entries are no patches of one image: there is no map of them.")
        values = self.scores if self.total is None else self.probabilities
        drawn = torch.full(self.grid, torch.nan)
        for i in (i for i, r in enumerate(self.rows) if r == row):
            if (patch := self.patches[i]) is not None:
                drawn[patch] = values[i, layer, candidate].float().cpu()
        return drawn

    def _kept(self, entries: list[int], what: str) -> LensReading:
        if not entries:
            raise InputError(f"There is nothing of {what}: rows are {sorted(set(self.rows))}.")
        return replace(
            self,
            scores=self.scores[entries],
            total=None if self.total is None else self.total[entries],
            rows=tuple(self.rows[i] for i in entries),
            positions=tuple(self.positions[i] for i in entries),
            patches=tuple(self.patches[i] for i in entries) if self.patches else (),
        )


def joined(readings: Sequence[LensReading]) -> LensReading:
    """Readings of several batches as one: the rows of a later batch count on.

    Raises: InputError if there are none, or they are of different lenses, layers or candidates.
    """
    if not readings:
        raise InputError("There is no reading to join.")
    first = readings[0]
    rows: list[int] = []
    for one in readings:
        if (one.lens, one.layers, one.candidates) != (first.lens, first.layers, first.candidates):
            raise InputError(
                f"A {first.lens} lens' reading of {len(first.layers)} layers and a {one.lens} lens' of "
                f"{len(one.layers)} cannot be joined: lens, layers and candidates are to be the same."
            )
        start = max(rows, default=-1) + 1
        rows += [start + row for row in one.rows]
    totals = [one.total for one in readings if one.total is not None]
    gaps = [one.own_gap for one in readings if one.own_gap is not None]
    return replace(
        first,
        scores=torch.cat([one.scores for one in readings]),
        total=torch.cat(totals) if totals else None,
        rows=tuple(rows),
        positions=tuple(p for one in readings for p in one.positions),
        patches=tuple(p for one in readings for p in one.patches),
        own_gap=max(gaps) if gaps else None,
    )
