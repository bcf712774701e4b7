"""Heads in words: a table with their texts and top images, heat maps of tokens, bars of group accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from PIL import Image

from methods_multimodal.plots.attention import overlay
from methods_multimodal.plots.heatmap import new_axes
from methods_multimodal.text_explanations.name_heads import HeadNames
from methods_multimodal.text_explanations.segmentation import Segmentation
from methods_multimodal.text_explanations.spurious import Groups


def head_table(
    record: HeadNames,
    picture_of: Callable[[int], Image.Image],
    ax: Axes | None = None,
    *,
    heads: Sequence[tuple[int, int]],
    n_texts: int = 3,
) -> Axes:
    """A line for each head: its first texts, each with the images that lie furthest along it."""
    ax = ax or new_axes()
    n_top = record.top_images.shape[-1]
    pitch = 0.76 * n_top + 0.7
    for row, (layer, head) in enumerate(heads):
        share = float(record.variance[layer, head])
        ax.text(
            -0.05,
            row + 0.5,
            f"head {layer}.{head}\n{share:.1%} of variance",
            ha="right",
            va="center",
            fontsize=8,
        )
        for column, name in enumerate(record.names(layer, head)[:n_texts]):
            left = column * pitch
            gained = float(record.variance_explained[layer, head, column])
            ax.text(left, row + 0.12, f"{name}  ({gained:.0%})", ha="left", va="center", fontsize=7)
            for place, number in enumerate(record.top_images[layer, head, column].tolist()):
                at = left + 0.76 * place
                ax.imshow(
                    np.asarray(picture_of(number).convert("RGB").resize((64, 64))),
                    extent=(at, at + 0.7, row + 0.95, row + 0.25),
                )
    ax.set_xlim(-0.2, n_texts * pitch)
    ax.set_ylim(len(heads), 0)
    ax.set_aspect("equal")
    ax.axis("off")
    ax.set_title(
        "heads, their texts (variance explained so far) and the images furthest along each", fontsize=10
    )
    return ax


def text_map(
    record: Segmentation,
    pixels: Any,
    ax: Axes | None = None,
    *,
    image: int = 0,
    text: int = 0,
    title: str = "",
) -> Axes:
    """How much each part of an image speaks for a text, over the picture."""
    return overlay(
        record.maps[image, text], pixels, ax, unit="part of the cosine", title=title, signed=True, smooth=True
    )


def group_bars(
    records: dict[str, Groups], ax: Axes | None = None, *, names: Sequence[str] | None = None
) -> Axes:
    """Accuracy of each group, a bar for each record, and the average as a line."""
    ax = ax or new_axes()
    n_groups, width = len(next(iter(records.values())).values), 0.8 / len(records)
    for i, (label, groups) in enumerate(records.items()):
        places = np.arange(n_groups) + i * width
        bars = ax.bar(places, 100 * groups.values.numpy(), width, label=f"{label} (worst {groups.worst:.0%})")
        ax.axhline(100 * groups.average, color=bars.patches[0].get_facecolor(), linestyle="--", linewidth=1)
    labels, middles = names or [str(i) for i in range(n_groups)], np.arange(n_groups) + 0.4 - width / 2
    ax.set_xticks(middles, labels, fontsize=7, rotation=45 if names else 0, ha="right" if names else "center")
    ax.set(ylabel="accuracy, %", ylim=(0, 105))
    ax.legend(fontsize=8, loc="lower right")
    ax.set_title("accuracy by group; dashed: average", fontsize=10)
    return ax
