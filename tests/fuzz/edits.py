"""Calls with two edits at once, and of one call of each step."""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from torch import Tensor

import mm_adapters as mm
from tests.fuzz.call import Call, Expect, Kind
from tests.fuzz.reads import MOVES, change_of, expected, joined, made, rows_of, sample, shown
from tests.fuzz.subjects import Subject, plain_run


def two_edits(rng: Random, subject: Subject) -> Call:
    """Two edits of one site, or of two: in the order given, reads after them."""
    given = subject.draw(rng)
    probes = sample(rng, subject, given, 2)
    plan = [(rng.choice(probes), rng.choice(MOVES)) for _ in range(2)]
    rows = [rows_of(rng, probe, given) for probe, _ in plan]

    def perform() -> dict[str, Any]:
        edits = [
            mm.Edit(p.site, move.fn, **made(rows=index))
            for (p, move), index in zip(plan, rows, strict=True)
        ]  # fmt: skip
        run = subject.model.run(given.ours, edit=edits, read=[p.site for p in probes])
        return {"output": subject.head(run.output)} | {p.site: run[p.site] for p in probes}

    def right() -> dict[str, Any]:
        change = [
            (p, change_of(move, index, None, None)) for (p, move), index in zip(plan, rows, strict=True)
        ]
        output, seen = plain_run(subject, given.plain, probes, change)
        return {"output": subject.head(output)} | {p.site: joined(p, seen[p.site]) for p in probes}

    edits = ", ".join(
        f"Edit({p.site!r}, {move.text}{shown(rows=index)})"
        for (p, move), index in zip(plan, rows, strict=True)
    )
    line = f"run({given.text}, edit=[{edits}], read={[p.site for p in probes]})"
    return Call("two edits", line, expected(*rows), subject, perform, right)


def by_calls(rng: Random, subject: Subject) -> Call:
    """Reads or edits one call of each step; most samplers make one call a step."""
    given = subject.draw(rng)
    probe = rng.choice([p for p in subject.probes if p.loop])
    order = rng.choice([0, 0, 1, 2])
    edits, there = rng.random() < 0.5, order < probe.per_step

    def perform() -> dict[str, Any]:
        where: dict[str, Any] = {"calls": [order]}
        if edits:
            edit = mm.Edit(probe.site, torch.zeros_like, **where)
            return {"output": subject.head(subject.model.run(given.ours, edit=[edit]).output)}
        return {"value": subject.model.run(given.ours, read=[mm.Read(probe.site, **where)])[probe.site]}

    def right() -> dict[str, Any]:
        def zeroed(call: int, value: Tensor) -> Tensor:
            return torch.zeros_like(value) if call % probe.per_step == order else value

        output, seen = plain_run(subject, given.plain, [probe], [(probe, zeroed)] if edits else [])
        kept = [v for call, v in enumerate(seen[probe.site]) if call % probe.per_step == order]
        return {"output": subject.head(output)} if edits else {"value": torch.stack(kept)}

    what = f"edit=[Edit({probe.site!r}, torch.zeros_like" if edits else f"read=[Read({probe.site!r}"
    line = f"run({given.text}, {what}, calls=[{order}])])"
    expect = Expect.VALUE if there else Expect.REFUSAL
    return Call("calls", line, expect, subject, perform, right, only_run_shows=True)


KINDS = (
    Kind(by_calls, fits=lambda s: any(p.loop for p in s.probes), weight=0.7),
    Kind(two_edits, weight=1),
)
