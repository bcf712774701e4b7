"""The layouts of a vision tower whose grid of patches is halved from stage to stage."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from mm_adapters.records.stages import Stages
from mm_adapters.sites.tower_view import TowerView
from mm_adapters.tokens.image_positions import Grid
from mm_adapters.tokens.layout import TokenLayout
from mm_adapters.tokens.patch_order import by_tile, by_window


def stage_layouts(tower: TowerView, order: Stages, pixels: Tensor, grid: Grid) -> dict[str, TokenLayout]:
    """The layout of each part of a tower, by the beginning of its sites' names.

    `grid` is that of the patches it cuts. A module that merges has the layout of what it gives.
    """
    n = len(pixels)
    shared: dict[tuple[int, ...], TokenLayout] = {}
    layouts = {
        f"{tower.name}.{_part(name)}": _once(shared, partial(by_tile, grid, 0, n), *grid)
        for name in tower.before
    }
    at = {path: (stack, i) for stack, paths in tower.stacks.items() for i, path in enumerate(paths)}
    for path, module in tower.module.named_modules():
        if path not in at:
            continue
        stack, layer = at[path]
        name = f"{tower.name}.{stack}.{layer}"
        if stack == order.merges:
            grid = (grid[0] + 1) // 2, (grid[1] + 1) // 2
        else:
            side, shift = _window(order, module, grid)
            cut = partial(by_window, grid, n, side, shift)
            layouts[f"{name}.{order.windowed}"] = _once(shared, cut, *grid, side, shift)
        layouts[name] = _once(shared, partial(by_tile, grid, 0, n), *grid)
    last = _once(shared, partial(by_tile, grid, 0, n), *grid)
    return layouts | {f"{tower.name}.{_part(name)}": last for name in tower.after}


def _window(order: Stages, block: nn.Module, grid: Grid) -> tuple[int, int]:
    """How many patches a side a block's windows have for this grid, and by how many it is rolled."""
    sizes: Any = block
    side, shift = int(getattr(sizes, order.window)), int(getattr(sizes, order.shift))
    return side, 0 if order.rolls_larger_only and min(grid) <= side else shift


def _once(shared: dict[tuple[int, ...], TokenLayout], make: Any, *key: int) -> TokenLayout:
    """Blocks of one stage share their layouts."""
    if key not in shared:
        shared[key] = make()
    return shared[key]


def _part(name: str) -> str:
    return name.partition(".")[0]
