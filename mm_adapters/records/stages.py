"""Positions that change on the way through a tower: what a family can say of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stages:
    """A grid of patches that is halved on the way, rounded up, and attends within windows (Swin).

    A block pads the grid below and at the right to whole windows, rolls it up and left, and attends
    within each window. The blocks and what merges are registered in the order they run.

    Args:
        merges: The stack of modules that each halve the grid.
        windowed: The parts of a block whose rows are windows, by the beginning of their names.
        window: A block's attribute: how many patches a side its windows have.
        shift: A block's attribute: by how many patches the grid is rolled.
        rolls_larger_only: It is not rolled where it is as small as a window, down or across.
    """

    merges: str = "merges"
    windowed: str = "attn"
    window: str = "window_size"
    shift: str = "shift_size"
    rolls_larger_only: bool = False
