"""What probes are asked, which rows they learn from, and the labels of their controls."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from methods_multimodal.core.record import Record
from mm_adapters import InputError

SHARES = (0.6, 0.2, 0.2)
# One value for each row.
Column = Sequence[Any] | np.ndarray | Tensor


@dataclass(frozen=True)
class Split(Record):
    """Which rows a probe learns from, is chosen on, and is judged on."""

    train: Int[Tensor, " train"]
    validation: Int[Tensor, " validation"]
    test: Int[Tensor, " test"]


def split_rows(
    n: int, seed: int = 0, *, shares: Sequence[float] = SHARES, groups: Sequence[Hashable] | None = None
) -> Split:
    """Shares the rows out at random; rows of one group (pictures of one scene, say) stay together.

    Raises: InputError if a part would be empty, or there are other than `n` groups' names.
    """
    if groups is not None and len(groups) != n:
        raise InputError(f"There are {len(groups)} groups' names for {n} rows.")
    order = np.random.default_rng(seed).permutation(n)
    if groups is not None:
        first = {group: place for place, group in reversed([(p, groups[i]) for p, i in enumerate(order)])}
        order = np.array(sorted(range(n), key=lambda i: first[groups[i]]), int)
    ends = np.round(np.cumsum(shares) / sum(shares) * n).astype(int)
    if groups is not None:
        ends = [_group_end(groups, order, int(end)) for end in ends]
    parts = [torch.from_numpy(np.sort(order[a:b])) for a, b in zip([0, *ends], ends, strict=False)]
    if len(parts) != 3 or not all(len(part) for part in parts):
        raise InputError(
            f"{n} rows do not give a training, a validation and a test part of {tuple(shares)}, but "
            f"{[len(part) for part in parts]}. Give more rows."
        )
    return Split(*parts)


def _group_end(groups: Sequence[Hashable], order: Any, end: int) -> int:
    while 0 < end < len(order) and groups[order[end]] == groups[order[end - 1]]:
        end += 1
    return end


def check_split(split: Split, n: int) -> None:
    """Raises: InputError for rows that there are not, a part without rows, or a row in two parts."""
    parts = {"train": split.train, "validation": split.validation, "test": split.test}
    for name, rows in parts.items():
        if not len(rows) or int(rows.min()) < 0 or int(rows.max()) >= n:
            raise InputError(f"The split's {name} part must be rows of 0 to {n - 1}, at least one.")
    together = torch.cat(list(parts.values()))
    if len(together.unique()) < len(together):
        raise InputError("The split has a row twice: what a probe is judged on must be new to it.")


@dataclass(frozen=True)
class Labels:
    """One variable: each row's class, as a number, and the classes' names."""

    name: str
    ids: Int[np.ndarray, " row"]
    classes: tuple[str, ...]

    @classmethod
    def of(cls, name: str, values: Column, split: Split) -> Labels:
        """The variable's values, classes in the order of their names.

        Raises: InputError if there is one class only, or one that no training row has.
        """
        names = [str(value.item() if isinstance(value, Tensor) else value) for value in values]
        classes = sorted(set(names))
        if len(classes) < 2:
            raise InputError(f"{name}: all rows are {classes[0]!r}; a probe needs two classes to tell apart.")
        ids = np.array([classes.index(one) for one in names])
        missing = set(range(len(classes))) - set(ids[split.train.numpy()].tolist())
        if missing:
            few = [classes[i] for i in sorted(missing)]
            raise InputError(
                f"{name}: no training row is {few[0]!r} ({int((ids == min(missing)).sum())} of all are). "
                "Give more rows of it, or leave it out."
            )
        return cls(name, ids, tuple(classes))

    def shuffled(self, seed: int) -> Int[np.ndarray, " row"]:
        """The same labels, each on another row."""
        return np.random.default_rng([seed, 1]).permutation(self.ids)

    def control(self, types: Sequence[Hashable], seed: int) -> Int[np.ndarray, " row"]:
        """A control task: each type of row gets one label, drawn as often as the variable has it.

        What a probe gets right of it, it has memorised, for nothing in the model's values is about it.

        Source: Hewitt and Liang 2019, arXiv 1909.03368, section 2.1.
        """
        kinds = sorted(set(types), key=str)
        drawn = np.random.default_rng([seed, 2]).choice(self.ids, len(kinds))
        of_type = dict(zip(kinds, drawn.tolist(), strict=True))
        return np.array([of_type[one] for one in types])

    def guess_rate(self, split: Split) -> float:
        """How often the class that is commonest in training is right on the test rows."""
        commonest = np.bincount(self.ids[split.train.numpy()]).argmax()
        return float((self.ids[split.test.numpy()] == commonest).mean())
