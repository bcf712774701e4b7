"""A picture as it is, with a caption."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes

from methods_multimodal.plots.heatmap import new_axes


def picture(pixels: Any, ax: Axes | None = None, *, title: str = "", caption: str = "") -> Axes:
    """An image (an array, or Pillow's) without axes; the caption stands below it."""
    ax = ax or new_axes()
    ax.imshow(pixels, interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_title(title, fontsize=10)
    ax.set_xlabel(caption, fontsize=9)
    return ax
