"""Word maps as pictures: attention over the drawing, a map's way through the steps, what blocking changes."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes

from methods_multimodal.cross_attention import WordChanges, WordMaps
from methods_multimodal.cross_attention._recipes import index_of, unit_range
from methods_multimodal.plots.attention import overlay, tiles
from methods_multimodal.plots.heatmap import UNSIGNED, colour_bar, new_axes

UNITS = {
    "mean": "attention weight",
    "daam": "summed attention",
    "relative": "standard deviations, against all words",
    "spread": "standard deviations",
}


def word_map(
    record: WordMaps,
    word: str,
    pixels: Any,
    ax: Axes | None = None,
    *,
    image: int = 0,
    recipe: str = "mean",
    threshold: float | None = None,
    note: str = "",
) -> Axes:
    """Where a word was attended to, over the drawing, with a line around what is above `threshold`.

    The threshold is from 0 to 1 of the map. `note` stands below the title.
    """
    values = record.heat(word, image, recipe)
    title = f"attention to “{word}”" + f"\n{note}" * bool(note)
    ax = overlay(values, pixels, ax, unit=UNITS[recipe], title=title, smooth=True)
    if threshold is not None:
        height, width = pixels.shape[:2]
        table = unit_range(values).detach().float().cpu().numpy()
        down, across = table.shape
        x = [(i + 0.5) * width / across for i in range(across)]
        y = [(i + 0.5) * height / down for i in range(down)]
        ax.contour(x, y, table, levels=[threshold], colors="white", linewidths=1.2)
    return ax


def word_change(
    record: WordChanges, word: str, ax: Axes | None = None, *, limit: float | None = None, note: str = ""
) -> Axes:
    """Which pixels change when a word is blocked; colours go from 0 to `limit` (None: this map's largest)."""
    ax = ax or new_axes()
    table = record.of(word).detach().float().cpu().numpy()
    image = ax.imshow(table, cmap=UNSIGNED, vmin=0.0, vmax=limit or float(table.max()) or 1.0)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_title(f"changed by blocking “{word}”" + f"\n{note}" * bool(note), fontsize=10)
    colour_bar(ax, image, "change of colour, 0 to 1")
    return ax


def film_strip(
    record: WordMaps, word: str, ax: Axes | None = None, *, image: int = 0, n_frames: int = 6
) -> Axes:
    """One word's map at some of the steps, from first to last, on one scale."""
    ax = ax or new_axes()
    maps = record.by_step()[:, image, index_of(word, record.words_of(image))]
    last = len(maps) - 1
    shown = sorted({round(i * last / max(n_frames - 1, 1)) for i in range(n_frames)})
    names = [f"step {i + 1}" for i in shown]
    return tiles(
        maps[shown], ax, names=names, unit="attention weight", title=f"attention to “{word}”, step by step"
    )
