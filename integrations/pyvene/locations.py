"""Locations below 0 count back from each row's last attended position; pyvene counts from 0 only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mm_adapters import InputError, SiteMap

# [row][unit]; for heads and positions of heads, one of each.
Located = Any


def counted(
    located: Located | None, representation: Any, sites: SiteMap, arguments: Mapping[str, Any] | None
) -> Located | None:
    """One intervention's locations, with each row's own positions for those below 0.

    `arguments` are what the model is called with where they are.

    Raises: InputError for heads below 0, a row without such a position, or a tower that reads no text.
    """
    unit = str(representation.unit)
    if located is None or not _has_negative(located):
        return located
    heads, positions = located if unit == "h.pos" else (None, located)
    if unit not in ("pos", "h.pos") or _has_negative(heads) or arguments is None:
        raise InputError(
            f"unit_locations of {unit!r} here are counted from 0, and {located} has some below. Positions of "
            "interventions that run in parallel may count back from a row's last attended one."
        )
    tower = sites.tower(str(representation.component).partition(".")[0])
    below = {p for units in positions for p in units if p < 0}
    places = {p: tower.row_positions(arguments, p).tolist() for p in below}
    rows = [[places[p][row] if p < 0 else p for p in units] for row, units in enumerate(positions)]
    return rows if heads is None else [heads, rows]


def alike(locations: Mapping[str, Any]) -> bool:
    """Whether every row has the same locations, of all interventions."""
    parts = [part for pair in locations.values() for part in pair if part is not None]
    return all(_rows_alike(located) for part in parts for located in part if located is not None)


def _rows_alike(located: Any) -> bool:
    return all(row == located[0] for row in located) if isinstance(located, list) else False


def _has_negative(located: Any) -> bool:
    if isinstance(located, Sequence):
        return any(_has_negative(part) for part in located)
    return isinstance(located, int) and located < 0
