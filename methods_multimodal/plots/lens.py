"""A lens as a table: the strongest candidates after each layer; and as maps: where a candidate is said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from methods_multimodal.lenses.reading import LensReading
from methods_multimodal.plots.attention import tiles
from methods_multimodal.plots.heatmap import UNSIGNED, colour_bar, heatmap, new_axes, norm_of
from methods_multimodal.plots.picture import picture


def lens_table(
    record: LensReading,
    name_of: Callable[[int], str] | None = None,
    ax: Axes | None = None,
    *,
    row: int = 0,
    k: int = 5,
) -> Axes:
    """Candidates written into cells coloured by their probability (or score), a line for each layer.

    `row` is the number of an entry: a row of the batch, where one position of each was read.
    """
    ax = ax or new_axes()
    name_of = name_of or record.name
    best, numbers = record.top(k, row)
    table = best.detach().float().cpu().numpy()
    limit = 1.0 if record.total is not None else float(np.abs(table).max()) or 1.0
    image = ax.imshow(table, cmap=UNSIGNED, norm=norm_of(table, False, limit), aspect="auto")
    for i, line in enumerate(numbers.tolist()):
        for j, candidate in enumerate(line):
            colour = "black" if table[i, j] > 0.6 * limit else "white"
            ax.text(
                j,
                i,
                f"{name_of(candidate)!r}\n{table[i, j]:z.2f}",
                ha="center",
                va="center",
                fontsize=8,
                color=colour,
            )
    ax.set_yticks(range(len(table)), record.layers, fontsize=8)
    ax.set_xticks(range(table.shape[1]), [f"{j + 1}." for j in range(table.shape[1])], fontsize=8)
    ax.set_title(f"{record.lens} lens at {_where(record, row)}", fontsize=10)
    colour_bar(ax, image, _unit(record))
    return ax


def lens_maps(
    record: LensReading,
    candidate: int,
    ax: Axes | None = None,
    *,
    row: int = 0,
    name_of: Callable[[int], str] | None = None,
) -> Axes:
    """Where in an image one candidate is said: a map of the patches after each layer, all on one scale.

    Raises: InputError if the reading is not of the patches of one image.
    """
    maps = torch.stack([record.mini_map(candidate, i, row) for i in range(len(record.layers))])
    what = f"{record.lens} lens: {(name_of or record.name)(candidate)!r}"
    signed = record.total is None and bool((maps < 0).any())
    return tiles(maps, ax, names=record.layers, unit=_unit(record), signed=signed, title=what)


def lens_candidates(record: LensReading, ax: Axes | None = None, *, row: int = 0) -> Axes:
    """Few candidates side by side: the score (or probability) of each after each layer, at one entry."""
    values = record.scores[row] if record.total is None else record.probabilities[row]
    return heatmap(
        values,
        ax,
        unit=_unit(record),
        signed=bool((values < 0).any()),
        rows=list(record.layers),
        columns=[record.name(i) for i in range(values.shape[1])],
        write="z.2f",
        title=f"{record.lens} lens at {_where(record, row)}",
    )


def lens_sheet(
    table: LensReading,
    maps: LensReading,
    candidates: Sequence[int],
    pixels: Any,
    name_of: Callable[[int], str] | None = None,
    *,
    caption: str = "",
) -> Figure:
    """The picture, the table of one position, and maps of a few candidates over patches, on one page."""
    name_of = name_of or table.name
    figure = Figure(figsize=(11, 4.2 + 2.1 * len(candidates)), layout="constrained")
    grid = figure.add_gridspec(1 + len(candidates), 3, height_ratios=[4.2, *[2.1] * len(candidates)])
    picture(pixels, figure.add_subplot(grid[0, 0]), title="the picture", caption=caption)
    lens_table(table, name_of, figure.add_subplot(grid[0, 1:]))
    for i, candidate in enumerate(candidates):
        called = None if maps.candidates else name_of
        lens_maps(maps, candidate, figure.add_subplot(grid[i + 1, :]), name_of=called)
    return figure


def _unit(record: LensReading) -> str:
    return "probability" if record.total is not None else record.unit


def _where(record: LensReading, entry: int) -> str:
    if record.patches and (patch := record.patches[entry]) is not None:
        return f"patch {patch[0]}, {patch[1]}"
    return record.where or f"position {record.positions[entry]}"
