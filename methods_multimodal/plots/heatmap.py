"""A table of numbers in colour, with its unit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from torch import Tensor

SIGNED, UNSIGNED = "RdBu_r", "viridis"


def new_axes() -> Axes:
    """Axes on a figure of their own; no global figure is made."""
    return Figure(layout="constrained").add_subplot()


def heatmap(
    values: Float[Tensor, "down across"],
    ax: Axes | None = None,
    *,
    unit: str,
    signed: bool = False,
    limit: float | None = None,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    write: str | None = None,
    label_rows: str = "",
    label_columns: str = "",
    title: str = "",
) -> Axes:
    """Each number as a coloured cell; `write` is a format for the numbers written into the cells.

    `signed` centres the colours on zero. `limit` is the largest value shown (None: of the data).
    """
    ax = ax or new_axes()
    table = values.detach().float().cpu().numpy()
    image = ax.imshow(
        table, cmap=SIGNED if signed else UNSIGNED, norm=norm_of(table, signed, limit), aspect="auto"
    )
    ticks(ax, rows, columns)
    ax.set(xlabel=label_columns, ylabel=label_rows)
    ax.set_title(title, fontsize=10)
    if write:
        _write(ax, table, write, image)
    colour_bar(ax, image, unit)
    return ax


def norm_of(table: Any, signed: bool, limit: float | None) -> Normalize:
    """From zero up, or as far below zero as above it."""
    most = limit or float(abs(table).max()) or 1.0
    return TwoSlopeNorm(0.0, -most, most) if signed else Normalize(0.0, most)


def ticks(ax: Axes, rows: Sequence[str] | None, columns: Sequence[str] | None) -> None:
    """Names along the sides; every so many if there is no room for all."""
    for axis, names, room in ((ax.yaxis, rows, 16), (ax.xaxis, columns, 16)):
        if names is None:
            axis.set_ticks([])
            continue
        every = range(0, len(names), -(-len(names) // room))
        axis.set_ticks(list(every), [names[i] for i in every], fontsize=8)


def colour_bar(ax: Axes, image: Any, unit: str, extend: str = "neither") -> None:
    """A colour bar that says what it measures."""
    bar = ax.figure.colorbar(image, ax=ax, extend=extend, fraction=0.05, pad=0.02)  # type: ignore[union-attr]
    bar.set_label(unit, fontsize=8)
    bar.ax.tick_params(labelsize=8)


def _write(ax: Axes, table: Any, form: str, image: Any) -> None:
    sign = form[:1] if form[:1] in ("+", "-", " ") else ""
    if form[-1:] in "eEfFgG%" and "z" not in form:
        form = f"{sign}z{form.removeprefix(sign)}"  # No -0.00.
    for i, row in enumerate(table):
        for j, value in enumerate(row):
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
            ax.text(
                j,
                i,
                format(value, form),
                ha="center",
                va="center",
                fontsize=7,
                color="white" if dark else "black",
            )
