"""Attention over patches: every head side by side, or one map over the picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from PIL import Image
from torch import Tensor

from methods_multimodal.plots.heatmap import SIGNED, UNSIGNED, colour_bar, new_axes, norm_of
from methods_multimodal.relevance.attention_maps import HeadMaps


def mosaic(record: HeadMaps, ax: Axes | None = None, *, row: int = 0, title: str = "") -> Axes:
    """One row's maps as tiles: layers downwards, heads across, all on one scale."""
    ax = ax or new_axes()
    table = record.mosaic(row).detach().float().cpu().numpy()
    n_heads, down, across = record.maps.shape[2:]
    # The brightest patches, often of one head, would leave the others black.
    most = float(record.maps[row].float().flatten().quantile(0.995))
    image = ax.imshow(table, cmap=UNSIGNED, norm=norm_of(table, False, most), aspect="equal")
    _tiles(ax, list(map(str, record.layers)), [str(i) for i in range(n_heads)], down, across)
    ax.set(xlabel="head", ylabel="layer")
    ax.set_title(title or f"attention of the {record.query} over patches", fontsize=10)
    colour_bar(ax, image, "attention weight", extend="max")
    return ax


def tiles(
    maps: Float[Tensor, "tile down across"],
    ax: Axes | None = None,
    *,
    names: Sequence[str],
    unit: str,
    signed: bool = False,
    title: str = "",
) -> Axes:
    """Maps side by side on one scale, each with its name below."""
    ax = ax or new_axes()
    table = maps.detach().float().cpu().permute(1, 0, 2).flatten(1).numpy()
    cmap = SIGNED if signed else UNSIGNED
    image = ax.imshow(table, cmap=cmap, norm=norm_of(table, signed, None), aspect="equal")
    _tiles(ax, [""], list(names), maps.shape[1], maps.shape[2])
    ax.set_title(title, fontsize=10)
    colour_bar(ax, image, unit)
    return ax


def overlay(
    values: Float[Tensor, "down across"],
    pixels: Any,
    ax: Axes | None = None,
    *,
    unit: str,
    title: str = "",
    signed: bool = False,
    smooth: bool = False,
) -> Axes:
    """A map laid over the picture it is about (in gray), stretched to its size.

    Without `signed` the colours go from the smallest value to the largest.
    """
    ax = ax or new_axes()
    height, width = pixels.shape[:2]
    extent = (0, width, height, 0)
    ax.imshow(Image.fromarray(pixels).convert("L"), cmap="gray", extent=extent)
    table = values.detach().float().cpu().numpy()
    norm = norm_of(table, True, None) if signed else Normalize(table.min(), table.max())
    image = ax.imshow(
        table,
        cmap=SIGNED if signed else "inferno",
        norm=norm,
        alpha=0.7,
        extent=extent,
        interpolation="bilinear" if smooth else "nearest",
    )
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_title(title, fontsize=10)
    colour_bar(ax, image, unit)
    return ax


def _tiles(ax: Axes, rows: list[str], columns: list[str], down: int, across: int) -> None:
    for i in range(1, len(rows)):
        ax.axhline(i * down - 0.5, color="white", linewidth=1.5)
    for i in range(1, len(columns)):
        ax.axvline(i * across - 0.5, color="white", linewidth=1.5)
    ax.set_yticks([(i + 0.5) * down - 0.5 for i in range(len(rows))], rows, fontsize=8)
    ax.set_xticks([(i + 0.5) * across - 0.5 for i in range(len(columns))], columns, fontsize=8)
    ax.tick_params(length=0)
