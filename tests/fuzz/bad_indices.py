"""Calls that name rows, positions or steps which are not there, or are no whole numbers."""

from __future__ import annotations

from random import Random
from typing import Any

import torch

import mm_adapters as mm
from tests.fuzz import indices
from tests.fuzz.call import Call, Expect, Kind
from tests.fuzz.indices import Index, Sort
from tests.fuzz.reads import MOVES, change_of, joined, length_at, made, picked, sample, shown
from tests.fuzz.subjects import Subject, plain_run


def bad_index(rng: Random, subject: Subject) -> Call:
    """Reads or edits at rows, positions or steps that are not there, or are no numbers."""
    given = subject.draw(rng)
    probe = sample(rng, subject, given, 1)[0]
    edits = rng.random() < 0.6
    sorts: tuple[Sort, ...] = ("rows", "steps", "positions") if edits else ("rows", "steps")
    sort = rng.choice(sorts)
    if sort == "rows" and given.steps is not None and not probe.loop:
        sort = "steps"
    n = {
        "rows": lambda: given.rows_at(probe),
        "steps": lambda: given.steps if given.steps and probe.loop else 1,
        "positions": lambda: length_at(subject, given, probe),
    }[sort]()
    unsure = rng.random() < 0.1
    index = indices.unsure(rng, n, sort) if unsure else indices.bad(rng, n, sort)
    if sort == "steps" and not probe.loop and index.means is not None:
        index = indices.bad(rng, n, sort)
    if sort == "rows" and index.text == "'foo'" and rng.random() < 0.5 and given.parts == 1:
        name = "uncond"
        index = Index(repr(name), lambda: name, None)
    if sort == "steps" and given.steps is not None and not probe.loop and index.means is None:
        # How often a pipeline's text tower is called is its own matter.
        index = rng.choice([Index("[]", list, None), Index("[0.5]", lambda: [0.5], None)])
    where = {"rows": None, "positions": None, "steps": None} | {sort: index}

    def perform() -> dict[str, Any]:
        if edits:
            run = subject.model.run(given.ours, edit=[mm.Edit(probe.site, torch.zeros_like, **made(**where))])
            return {"output": subject.head(run.output)}
        run = subject.model.run(given.ours, read=[mm.Read(probe.site, **made(**where))])
        return {"output": subject.head(run.output)} | dict(run.values)

    def right() -> dict[str, Any]:
        if edits:
            change = change_of(MOVES[0], where["rows"], where["positions"], where["steps"], probe.per_step)
            return {"output": subject.head(plain_run(subject, given.plain, (), [(probe, change)])[0])}
        output, seen = plain_run(subject, given.plain, [probe])
        rows, steps = where["rows"], where["steps"]
        parts = [picked(v, rows.means if rows else None) for v in seen[probe.site]]
        return {
            "output": subject.head(output),
            probe.site: joined(probe, parts, steps.means if steps else None),
        }

    what = f"edit=[Edit({probe.site!r}, torch.zeros_like" if edits else f"read=[Read({probe.site!r}"
    expect = Expect.REFUSAL if index.means is None else Expect.EITHER
    text = f"run({given.text}, {what}{shown(**where)})])"
    return Call(f"bad {sort}", text, expect, subject, perform, right)


KINDS = (Kind(bad_index, weight=3.5),)
