"""Concepts: names in categories, where they are in a picture, and lists of them in files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from mm_adapters import InputError
from mm_adapters.store import read_text


@dataclass(frozen=True)
class Concepts:
    """The names that a unit can get. `categories[i]` is what `names[i]` is one of ("colour", "shape")."""

    names: tuple[str, ...]
    categories: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.names:
            raise InputError("There are no concepts.")
        if len(self.names) != len(self.categories):
            raise InputError(f"{len(self.names)} concepts have {len(self.categories)} categories.")
        twice = [name for name, count in Counter(self.names).items() if count > 1]
        if twice:
            raise InputError(f"Concepts that are listed twice: {', '.join(twice[:8])}. Name each once.")

    def __len__(self) -> int:
        return len(self.names)

    def index(self, name: str) -> int:
        """The number of a concept. Raises: InputError if there is none of this name."""
        if name not in self.names:
            raise InputError(f"No concept {name!r}; there is {', '.join(self.names[:12])} ...")
        return self.names.index(name)

    def members(self) -> Int[Tensor, " concept"]:
        """The number of each concept's category, in the order the categories first appear."""
        order = list(dict.fromkeys(self.categories))
        return torch.tensor([order.index(c) for c in self.categories])


Mask = NDArray[np.bool_]
Masks = Mapping[str, Mask]
"""What one picture shows: for each concept that is in it, which pixels [height, width]."""


def stacked(masks: Masks, concepts: Concepts) -> tuple[list[int], Bool[Tensor, "present height width"]]:
    """The numbers of the concepts present, and where each is.

    Raises: InputError if a mask is of no concept, or the masks differ in size.
    """
    present = [concepts.index(name) for name in masks]
    sizes = {mask.shape for mask in masks.values()}
    if len(sizes) > 1:
        raise InputError(f"The masks of one picture differ in size: {sorted(sizes)}.")
    if not present:
        return [], torch.zeros(0, 1, 1, dtype=torch.bool)
    return present, torch.from_numpy(np.stack([np.asarray(m, bool) for m in masks.values()]))


def presence(
    masks: Sequence[Masks], concepts: Concepts, min_share: float = 0.0
) -> Bool[Tensor, "image concept"]:
    """Which concepts each picture shows, on more than `min_share` of its pixels."""
    out = torch.zeros(len(masks), len(concepts), dtype=torch.bool)
    for row, shown in enumerate(masks):
        for name, mask in shown.items():
            out[row, concepts.index(name)] = float(np.mean(mask)) > min_share
    return out


def shares(
    masks: Sequence[Masks], concepts: Concepts, grid: tuple[int, int]
) -> Float[Tensor, "image concept row column"]:
    """How much of each cell of a grid each concept covers, in [0, 1]."""
    out = torch.zeros(len(masks), len(concepts), *grid)
    for row, shown in enumerate(masks):
        present, where = stacked(shown, concepts)
        if present:
            out[row, present] = torch.nn.functional.adaptive_avg_pool2d(where[None].float(), grid)[0]
    return out


def read_concepts(path: Path) -> Concepts:
    """A concept list: one a line, with its category before a tab if it has one.

    Raises: InputError for a file that is no text in UTF-8; for an empty line or a name that occurs twice,
    with the line's number.
    """
    names: list[str] = []
    categories: list[str] = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        category, _, name = line.rpartition("\t")
        if not name.strip():
            raise InputError(f"{path}, line {number} is empty. Remove it: each line is a concept.")
        if name.strip() in names:
            first = names.index(name.strip()) + 1
            raise InputError(f"{path}, line {number}: {name.strip()!r} is also line {first}. Name each once.")
        names.append(name.strip())
        categories.append(category.strip() or "concept")
    return Concepts(tuple(names), tuple(categories))
