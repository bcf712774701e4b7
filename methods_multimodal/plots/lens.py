"""The logit lens as a table: the likeliest tokens after each layer."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.axes import Axes

from methods_multimodal.lenses.logit_lens import LogitLens
from methods_multimodal.plots.heatmap import UNSIGNED, colour_bar, new_axes, norm_of


def lens_table(
    record: LogitLens, name_of: Callable[[int], str], ax: Axes | None = None, *, row: int = 0, k: int = 5
) -> Axes:
    """Tokens written into cells coloured by their probability, a line for each layer."""
    ax = ax or new_axes()
    probabilities, ids = record.top(k, row)
    table = probabilities.detach().cpu().numpy()
    image = ax.imshow(table, cmap=UNSIGNED, norm=norm_of(table, False, 1.0), aspect="auto")
    for i, line in enumerate(ids.tolist()):
        for j, token in enumerate(line):
            colour = "black" if table[i, j] > 0.6 else "white"
            ax.text(
                j,
                i,
                f"{name_of(token)!r}\n{table[i, j]:z.2f}",
                ha="center",
                va="center",
                fontsize=8,
                color=colour,
            )
    names = ["embedding", *(f"layer {i}" for i in range(len(table) - 1))]
    ax.set_yticks(range(len(table)), names, fontsize=8)
    ax.set_xticks(range(k), [f"{j + 1}." for j in range(k)], fontsize=8)
    where = "the last position" if record.position == -1 else f"position {record.position}"
    ax.set_title(f"logit lens at {where}", fontsize=10)
    colour_bar(ax, image, "probability")
    return ax
