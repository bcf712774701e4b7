"""Pictures of a dissection: a layer's detectors by category, and one unit's evidence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from torch import Tensor

from methods_multimodal.dissection.concepts import Concepts
from methods_multimodal.plots.heatmap import new_axes

_MANY = 30


def detectors(
    names: Sequence[str],
    chosen: Sequence[int],
    concepts: Concepts,
    ax: Axes | None = None,
    *,
    title: str = "",
) -> Axes:
    """How many units detect each concept, the categories side by side; only the units `chosen` count."""
    ax = ax or new_axes()
    counts = Counter(names[unit] for unit in chosen)
    order = list(dict.fromkeys(concepts.categories))
    rows = [
        (category, name, counts[name])
        for category in order
        for name in concepts.names
        if concepts.categories[concepts.index(name)] == category and counts[name]
    ]
    if len(rows) > _MANY:
        rows = sorted(sorted(rows, key=lambda row: -row[2])[:_MANY], key=lambda row: order.index(row[0]))
    for number, category in enumerate(order):
        at = [i for i, row in enumerate(rows) if row[0] == category]
        if at:
            total = sum(rows[i][2] for i in at)
            ax.bar(at, [rows[i][2] for i in at], color=f"C{number % 10}", label=f"{category} ({total})")
    ax.set_xticks(range(len(rows)), [name for _, name, _ in rows], rotation=60, ha="right", fontsize=8)
    ax.set_ylabel("units")
    ax.set_title(title or f"{sum(counts.values())} of {len(names)} units", fontsize=10)
    if rows:
        ax.legend(fontsize=8)
    return ax


def activation_histogram(
    activations: Float[Tensor, " image"],
    ax: Axes | None = None,
    *,
    shown: Any = None,
    name: str = "",
    title: str = "",
) -> Axes:
    """A unit's activations on all pictures; those that show the named concept in colour."""
    ax = ax or new_axes()
    values = activations.detach().float().cpu().numpy()
    edges = np.histogram_bin_edges(values, bins=24)
    ax.hist(values, bins=list(edges), color="0.75", label="all pictures")
    if shown is not None and np.asarray(shown).any():
        ax.hist(
            values[np.asarray(shown, bool)], bins=list(edges), color="C1", alpha=0.8, label=f"with {name}"
        )
        ax.legend(fontsize=7)
    ax.set(xlabel="activation (mean over places)", ylabel="pictures")
    ax.locator_params(axis="x", nbins=4)
    ax.set_title(title, fontsize=10)
    return ax
