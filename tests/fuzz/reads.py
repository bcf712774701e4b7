"""Calls that read and edit: which rows, positions and steps, and what a plain hook sees and does there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

import mm_adapters as mm
from tests.fuzz import indices
from tests.fuzz.call import Call, Expect, Kind
from tests.fuzz.indices import Index
from tests.fuzz.probes import Change, Probe
from tests.fuzz.subjects import Given, Subject, plain_run


@dataclass(frozen=True)
class Move:
    """What an edit's function does; in place or not, the same comes out."""

    text: str
    fn: Callable[[Tensor], Tensor]
    pure: Callable[[Tensor], Tensor]


def _halved_in_place(value: Tensor) -> Tensor:
    value.mul_(0.5)
    return value


def _zeroed_in_place(value: Tensor) -> Tensor:
    value[:] = 0
    return value


MOVES = (
    Move("torch.zeros_like", torch.zeros_like, torch.zeros_like),
    Move("lambda v: v * 0.5", lambda v: v * 0.5, lambda v: v * 0.5),
    Move("lambda v: -v", lambda v: -v, lambda v: -v),
    Move("lambda v: v + 1", lambda v: v + 1, lambda v: v + 1),
    Move("lambda v: v.double() * 2", lambda v: v.double() * 2, lambda v: v * 2),
    Move("lambda v: v.mul_(0.5)", _halved_in_place, lambda v: v * 0.5),
    Move("lambda v: v[:] = 0", _zeroed_in_place, torch.zeros_like),
    Move("lambda v: v", lambda v: v, lambda v: v),
)  # fmt: skip
REDUCES: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = (
    ("lambda v: v.mean(1)", lambda v: v.mean(1)),
    ("lambda v: v[:, -1]", lambda v: v[:, -1]),
    ("lambda v: v.double() ** 2", lambda v: v.double() ** 2),
    ("lambda v: v.flatten(1).norm(dim=1)", lambda v: v.flatten(1).norm(dim=1)),
)


def sample(rng: Random, subject: Subject, given: Given, most: int = 2) -> list[Probe]:
    usable = [p for p in subject.probes if p.needs != "images" or "images" in given.ours or not subject.raw
              or "pixel_values" in given.ours]  # fmt: skip
    return rng.sample(usable, rng.randint(1, min(most, len(usable))))


def joined(probe: Probe, values: list[Tensor], steps: tuple[int, ...] | None = None) -> Tensor:
    """The value of a site: of a loop [call, row, ...], else the calls' rows one after the other."""
    if not probe.loop:
        return torch.cat(values)
    kept = [v for call, v in enumerate(values) if steps is None or call // probe.per_step in steps]
    return torch.stack(kept)


def picked(value: Tensor, rows: tuple[int, ...] | None) -> Tensor:
    return value if rows is None else value[list(rows)]


def named_rows(rng: Random, probe: Probe, given: Given) -> Index | None:
    """ "cond" or "uncond", where a denoiser is guided by both in one call."""
    if not probe.loop or given.parts != 2 or rng.random() < 0.7:
        return None
    name, first = rng.choice([("uncond", 0), ("cond", given.rows)])
    return Index(repr(name), lambda: name, tuple(range(first, first + given.rows)))


def rows_of(rng: Random, probe: Probe, given: Given) -> Index | None:
    """Valid rows; None for all of them. A text tower of a pipeline is called for each prompt apart."""
    if rng.random() < 0.4 or (given.steps is not None and not probe.loop):
        return None
    return named_rows(rng, probe, given) or indices.valid(rng, given.rows_at(probe), "rows")


def steps_of(rng: Random, probe: Probe, given: Given) -> Index | None:
    if given.steps is None or not probe.loop or rng.random() < 0.5:
        return None
    return indices.valid(rng, given.steps, "steps")


def shown(**where: Index | None) -> str:
    return "".join(f", {name}={index.text}" for name, index in where.items() if index is not None)


def made(**where: Index | None) -> dict[str, Any]:
    return {name: index.make() for name, index in where.items() if index is not None}


def expected(*where: Index | None) -> Expect:
    return Expect.EITHER if any(i is not None and i.or_refused for i in where) else Expect.VALUE


def reading(rng: Random, subject: Subject) -> Call:
    """Reads one or two sites, of some rows and steps, perhaps reduced."""
    given = subject.draw(rng)
    plan = []
    for probe in sample(rng, subject, given):
        reduce = rng.choice(REDUCES) if rng.random() < 0.3 else None
        plan.append((probe, rows_of(rng, probe, given), steps_of(rng, probe, given), reduce))

    def perform() -> dict[str, Any]:
        reads = [
            mm.Read(p.site, reduce=reduce[1] if reduce else None, **made(rows=rows, steps=steps))
            for p, rows, steps, reduce in plan
        ]
        run = subject.model.run(given.ours, read=reads)
        return {"output": subject.head(run.output)} | {p.site: run[p.site] for p, *_ in plan}

    def right() -> dict[str, Any]:
        output, seen = plain_run(subject, given.plain, [p for p, *_ in plan])
        values = {"output": subject.head(output)}
        for probe, rows, steps, reduce in plan:
            fold = reduce[1] if reduce else lambda v: v
            parts = [fold(picked(v, rows.means if rows else None)) for v in seen[probe.site]]
            values[probe.site] = joined(probe, parts, steps.means if steps else None)
        return values

    text = ", ".join(
        f"Read({p.site!r}{shown(rows=rows, steps=steps)}{f', reduce={reduce[0]}' if reduce else ''})"
        for p, rows, steps, reduce in plan
    )
    wheres = [index for _, rows, steps, _ in plan for index in (rows, steps)]
    return Call(
        "read", f"run({given.text}, read=[{text}])", expected(*wheres), subject, perform, right
    )  # fmt: skip


def change_of(
    move: Move, rows: Index | None, positions: Index | None, steps: Index | None, per_step: int = 1
) -> Change:
    """The edit, as a plain hook makes it."""

    def change(call: int, value: Tensor) -> Tensor:
        if steps is not None and steps.means is not None and call // per_step not in steps.means:
            return value
        at: Any = slice(None) if rows is None or rows.means is None else list(rows.means)
        new = value.clone()
        if positions is None or positions.means is None:
            new[at] = move.pure(value[at]).to(value.dtype)
        else:
            part = new[at]
            here = list(positions.means)
            part[:, here] = move.pure(part[:, here]).to(value.dtype)
            new[at] = part
        return new

    return change


def length_at(subject: Subject, given: Given, probe: Probe) -> int:
    """How many positions the value has at its first call."""
    _, seen = plain_run(subject, given.plain, [probe])
    return seen[probe.site][0].shape[1]


def moved(before: list[Tensor], after: list[Tensor]) -> float:
    """The root mean square of the change over that of what was edited."""
    change = sum(float((b.double() - a.double()).square().sum()) for a, b in zip(before, after, strict=True))
    size = sum(float(a.double().square().sum()) for a in before)
    return (change / size) ** 0.5 if size else 0.0


def editing(rng: Random, subject: Subject) -> Call:
    """Edits a site at some rows, positions and steps, and perhaps reads it."""
    given = subject.draw(rng)
    probe, move = sample(rng, subject, given, 1)[0], rng.choice(MOVES)
    rows, steps = rows_of(rng, probe, given), steps_of(rng, probe, given)
    positions = None
    if rng.random() < 0.4:
        positions = indices.valid(rng, length_at(subject, given, probe), "positions")
    reads = [probe] if rng.random() < 0.5 else []
    where = {"rows": rows, "positions": positions, "steps": steps}

    def perform() -> dict[str, Any]:
        edit = mm.Edit(probe.site, move.fn, **made(**where))
        run = subject.model.run(given.ours, edit=[edit], read=[p.site for p in reads])
        receipt = run.receipts[0]
        values = {"output": subject.head(run.output), "moved": receipt.moved, "fired": receipt.fired}
        return values | {p.site: run[p.site] for p in reads}

    def right() -> dict[str, Any]:
        change = change_of(move, rows, positions, steps, probe.per_step)
        edited: list[tuple[Tensor, Tensor]] = []

        def both(call: int, value: Tensor) -> Tensor:
            new = change(call, value)
            if steps is None or steps.means is None or call // probe.per_step in steps.means:
                at: Any = slice(None) if rows is None else list(rows.means or ())
                was, now = value[at], new[at]
                if positions is not None:
                    was, now = (x[:, list(positions.means or ())] for x in (was, now))
                edited.append((was, now))
            return new

        output, seen = plain_run(subject, given.plain, reads, [(probe, both)])
        values = {"output": subject.head(output), "fired": len(edited)}
        values["moved"] = moved([a for a, _ in edited], [b for _, b in edited])
        return values | {p.site: joined(p, seen[p.site]) for p in reads}

    text = f"edit=[Edit({probe.site!r}, {move.text}{shown(**where)})], read={[p.site for p in reads]}"
    return Call("edit", f"run({given.text}, {text})", expected(*where.values()), subject, perform, right)


KINDS = (Kind(reading, weight=4.5), Kind(editing, weight=4))
