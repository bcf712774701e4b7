"""A finished report: a figure, the numbers behind it, and the lines worth printing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from methods_multimodal.core.files import write_json
from mm_adapters import Model, TokenLayout
from mm_adapters.store import atomic_write

LETTERS = ("A", "B")  # The image, and what it is compared with.
# Rows that are patched in one run: few, for a run is what a kill costs.
PATCHED_ROWS = 16


@dataclass(frozen=True)
class Report:
    """`numbers` is plain data, written beside the picture as JSON."""

    figure: Figure
    numbers: dict[str, Any]
    lines: tuple[str, ...]

    def write(self, out: Path) -> tuple[Path, Path]:
        """Writes the picture to `out` and the numbers beside it; returns both paths."""
        numbers = out.with_suffix(".json")
        with atomic_write(out, keep_suffix=True) as part:
            self.figure.savefig(part, dpi=110)
        write_json(numbers, self.numbers)
        return out, numbers


def new_page(width: float, height: float, title: str) -> Figure:
    """An empty page."""
    margins = ConstrainedLayoutEngine(rect=(0.01, 0.01, 0.98, 0.98))
    figure = Figure(figsize=(width, height), layout=margins)
    figure.suptitle(title, fontsize=13)
    return figure


def say(ax: Axes, message: str) -> None:
    """A message in place of a plot."""
    ax.axis("off")
    ax.text(0.5, 0.5, message, ha="center", va="center", wrap=True, fontsize=9, transform=ax.transAxes)


def as_seen(model: Model, pixels: Float[Tensor, "3 height width"]) -> Any:
    """Prepared pixels as a picture again: what the model was shown, [height, width, 3] bytes."""
    process = getattr(model.preparer, "image_processor", None)
    mean, std = getattr(process, "image_mean", None), getattr(process, "image_std", None)
    pixels = pixels.detach().float().cpu()
    if mean is not None and std is not None:
        pixels = pixels * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    else:
        pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min()).clamp_min(1e-6)
    return (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def windows(layout: TokenLayout, most: int = 64) -> tuple[list[list[int]], tuple[int, int]]:
    """The patches' positions in square windows, at most about `most` of them, and the windows' grid."""
    assert layout.grid is not None
    rows, columns = layout.grid
    side = max(1, math.ceil(math.sqrt(rows * columns / most)))
    down, across = math.ceil(rows / side), math.ceil(columns / side)
    members: list[list[int]] = [[] for _ in range(down * across)]
    for position, place in enumerate(layout.patches[0]):
        if place is not None:
            members[place[0] // side * across + place[1] // side].append(position)
    return members, (down, across)


def spread(n_layers: int, most: int = 6) -> list[int]:
    """All layers, or `most` of them from the first to the last."""
    if n_layers <= most:
        return list(range(n_layers))
    return [round(i * (n_layers - 1) / (most - 1)) for i in range(most)]


def rounded(values: Tensor, digits: int = 6) -> Any:
    """A tensor as nested lists of short numbers, none of them -0.0."""
    return _rounded(values.detach().float().cpu().tolist(), digits)


def strongest(table: Float[Tensor, "layer head"], n: int = 3) -> Sequence[tuple[int, int, float]]:
    """The largest entries in size: (layer, head, value)."""
    flat = table.flatten()
    order = flat.abs().argsort(descending=True)[:n].tolist()
    width = table.shape[1]
    return [(i // width, i % width, float(flat[i])) for i in order]


def _rounded(value: Any, digits: int) -> Any:
    return [_rounded(v, digits) for v in value] if isinstance(value, list) else round(value, digits) + 0.0
