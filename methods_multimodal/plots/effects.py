"""What each piece of a run does, with its interval."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes

from methods_multimodal.cross_attention import Effects
from methods_multimodal.plots.heatmap import SIGNED, colour_bar, new_axes, norm_of


def effect_grid(record: Effects, ax: Axes | None = None, *, title: str = "", level: float = 0.95) -> Axes:
    """Layers (and heads) downwards, steps across; each cell with its share of the whole and its interval.

    Below stands its control's share. A cell whose share is true by construction says so.
    """
    ax = ax or new_axes()
    share, control = record.share(level), record.control_share(level)
    places = list(zip(record.layers, record.heads, strict=True))
    rows, columns = list(dict.fromkeys(places)), list(dict.fromkeys(record.steps))
    table = torch.full((len(rows), len(columns)), float("nan"))
    cell_texts: dict[tuple[int, int], str] = {}
    for i, (place, steps) in enumerate(zip(places, record.steps, strict=True)):
        at = rows.index(place), columns.index(steps)
        table[at] = share.mean[i]
        mean, low, high = (f"{float(x[i]):+z.2f}" for x in (share.mean, share.low, share.high))
        below = "by construction" if record.by_construction[i] else f"{low} to {high}"
        beside = f"{float(control.mean[i]):+z.2f}" if any(record.control_of) else "none"
        cell_texts[at] = f"{mean}\n{below}\ncontrol {beside}"
    shown = table.nan_to_num(0.0).numpy()
    norm = norm_of(shown, True, max(1.0, float(abs(shown).max())))
    image = ax.imshow(shown, cmap=SIGNED, norm=norm, aspect="auto")
    for (i, j), text in cell_texts.items():
        dark = abs(float(norm(shown[i, j])) - 0.5) > 0.3
        colour = "white" if dark else "black"
        if len(cell_texts) <= 80:
            ax.text(j, i, text, ha="center", va="center", fontsize=6.5, color=colour)
    ax.set_yticks(range(len(rows)), [_called(*row) for row in rows], fontsize=8)
    ax.set_xticks(range(len(columns)), [_span(c) or "all steps" for c in columns], fontsize=8)
    ax.set(xlabel="steps", ylabel="layer" if not any(h for _, h in rows) else "layer, head")
    ax.set_title(title or f"{record.what}: share of the whole effect", fontsize=10)
    colour_bar(ax, image, f"share of the whole effect ({level:.0%} interval and control below)")
    return ax


def effect_pairs(
    fast: torch.Tensor, exact: torch.Tensor, ax: Axes | None = None, *, unit: str = "metric", title: str = ""
) -> Axes:
    """An estimate of effects beside the effects themselves, with the line where both are the same."""
    ax = ax or new_axes()
    x, y = exact.flatten().tolist(), fast.flatten().tolist()
    low, high = min(*x, *y), max(*x, *y)
    ax.plot([low, high], [low, high], color="gray", linewidth=0.8)
    ax.scatter(x, y, s=14, color="#2166ac")
    ax.set_xlabel(f"patched ({unit})", fontsize=8)
    ax.set_ylabel(f"attributed ({unit})", fontsize=8)
    ax.tick_params(labelsize=8)
    ax.set_title(title, fontsize=10)
    return ax


def _called(layers: Sequence[int], heads: Sequence[int]) -> str:
    return ", ".join(x for x in (_span(layers) or "all", f"head {_span(heads)}" if heads else "") if x)


def _span(values: Sequence[int]) -> str:
    """Numbers as they are counted in the code, from 0."""
    if not values:
        return ""
    return str(values[0]) if len(values) == 1 else f"{values[0]}-{values[-1]}"
