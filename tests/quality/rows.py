"""Rows of a measured table: a number with its interval, and its nulls with theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from methods_multimodal.core.statistics import Estimate, bootstrap

# Values of one measure: [prompt][draw of the noise], NaN where a picture cannot be judged.
Table = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Row:
    """One row: what it is, its value, and each null beside it; `above` is the paired difference to the first.

    `note` says what is true by construction, and what is missing.
    """

    what: str
    value: Estimate
    nulls: Mapping[str, Estimate] = field(default_factory=dict)
    above: Estimate | None = None
    n: int = 0
    note: str = ""

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "what": self.what,
            "value": _plain(self.value),
            "nulls": {name: _plain(null) for name, null in self.nulls.items()},
            "above the first null": None if self.above is None else _plain(self.above),
            "n": self.n,
            "note": self.note,
        }


def row(what: str, values: Table, nulls: Mapping[str, Table] | None = None, note: str = "") -> Row | None:
    """A row of values by prompt and noise, its nulls from the same pictures; None without any value.

    Intervals draw prompts again, then the noises of each; the difference to the first null is paired.
    """
    nulls = nulls or {}
    first = next(iter(nulls.values()), None)
    above = None
    if first is not None:
        pairs = [
            [(a, b) for a, b in zip(x, y, strict=True) if not np.isnan(a + b)]
            for x, y in zip(values, first, strict=True)
        ]
        pairs = [p for p in pairs if p]
        if pairs:
            own, other = ([torch.tensor([pair[i] for pair in p]) for p in pairs] for i in (0, 1))
            above = bootstrap(own, than=other, n_resamples=2000)
    value = _estimate(values)
    if value is None:
        return None
    judged = {name: of for name, table in nulls.items() if (of := _estimate(table)) is not None}
    return Row(what, value, judged, above, len(value.values), note)


def markdown(title: str, rows: Sequence[Row | None]) -> str:
    """The rows as a table for a page."""
    lines = [
        f"### {title}",
        "",
        "| what | value | null | above the null | prompts |",
        "|---|---|---|---|---|",
    ]
    for one in rows:
        if one is None:
            continue
        nulls = "; ".join(f"{name} {_said(null)}" for name, null in one.nulls.items()) or "–"
        above = "–" if one.above is None else _said(one.above, "+")
        note = f" *({one.note})*" if one.note else ""
        lines.append(f"| {one.what}{note} | {_said(one.value)} | {nulls} | {above} | {one.n} |")
    return "\n".join(lines)


def _estimate(table: Table) -> Estimate | None:
    kept = [torch.tensor([v for v in draws if not np.isnan(v)]) for draws in table]
    kept = [draws for draws in kept if len(draws)]
    return bootstrap(kept, n_resamples=2000) if kept else None


def _plain(of: Estimate) -> list[float]:
    return [round(x, 4) for x in (of.mean, of.low, of.high)]


def _said(of: Estimate, sign: str = "") -> str:
    mean, low, high = (format(x, f"{sign}z.2f") for x in (of.mean, of.low, of.high))
    return f"{mean} ({low} to {high})"
