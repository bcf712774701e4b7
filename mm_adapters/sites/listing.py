"""A model's sites for a terminal: one line for a part of all layers, no wider than the window."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from itertools import groupby

from mm_adapters.records.spec import Site


def listing(sites: Iterable[Site], width: int, *, every: bool = False) -> str:
    """The sites, each with its layers and axes, then what is absent and why.

    A part that several layers have with the same axes is one line, whose name is a pattern that finds
    them all; with `every`, each site has its own.
    """
    all_sites = list(sites)
    present = [site for site in all_sites if site.reason is None]
    rows = [_row(site) for site in present] if every else _folded(present)
    names = max((len(name) for name, _, _ in rows), default=0)
    layers = max((len(where) for _, where, _ in rows), default=0)
    lines = []
    for name, where, axes in rows:
        line = f"{name:<{names}}  {where:<{layers}}  {axes}" if layers else f"{name:<{names}}  {axes}"
        lines += [line] if len(line) <= width else [name, f"    {where}  {axes}" if where else f"    {axes}"]
    for site in all_sites:
        if site.reason is not None:
            lines += textwrap.wrap(
                f"absent: {site.name}: {site.reason}", max(40, width), subsequent_indent="    "
            )
    return "\n".join(lines)


def _row(site: Site, name: str | None = None, where: str = "") -> tuple[str, str, str]:
    return name or site.name, where, f"[{', '.join(site.axes)}]"


def _folded(sites: Sequence[Site]) -> list[tuple[str, str, str]]:
    """One row for each part of a stack with the same axes, where its first layer's is."""
    rows: list[tuple[str, str, str]] = []
    for (tower, stack), group in groupby(sites, key=lambda s: (s.tower, s.stack)):
        parts: dict[tuple[str, tuple[str, ...]], list[Site]] = {}
        for site in group:
            parts.setdefault((site.part, site.axes), []).append(site)
        for (part, _), same in parts.items():
            numbers = [s.layer for s in same if s.layer is not None]
            if stack is None or len(numbers) < 2:
                rows += [_row(s) for s in same]
            else:
                rows.append(_row(same[0], f"{tower}.{stack}.*.{part}", ranges(numbers)))
    return rows


def ranges(numbers: Sequence[int]) -> str:
    """Rising numbers as a few words: 0-11, or 0-3, 8, or 0-10 by 2."""
    step = numbers[1] - numbers[0] if len(numbers) > 2 else 1
    if step > 1 and list(numbers) == list(range(numbers[0], numbers[-1] + 1, step)):
        return f"{numbers[0]}-{numbers[-1]} by {step}"
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
