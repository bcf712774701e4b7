"""Runs beside and inside one another: threads, runs nested in an edit, two models at once."""

from __future__ import annotations

import threading
from random import Random
from typing import Any

import torch
from torch import Tensor

import mm_adapters as mm
from tests.fuzz.call import Call, Expect, Kind
from tests.fuzz.models import subject
from tests.fuzz.reads import joined, sample
from tests.fuzz.subjects import Subject, plain_run

SECONDS = 20


def threads(rng: Random, one: Subject) -> Call:
    """A run that reads, begun while another thread's edit of the same model is under way."""
    given = one.draw(rng)
    probe = sample(rng, one, given, 1)[0]
    read = rng.random() < 0.6

    def perform() -> dict[str, Any]:
        begun, done, came = threading.Event(), threading.Event(), []

        def slow(value: Tensor) -> Tensor:
            begun.set()
            done.wait(0.5)
            return torch.zeros_like(value)

        def edited() -> None:
            try:
                one.model.run(given.ours, edit=[mm.Edit(probe.site, slow)])
            except Exception:  # noqa: BLE001
                begun.set()

        def plain() -> None:
            try:
                came.append(one.model.run(given.ours, read=[probe.site] if read else []))
            except Exception as error:  # noqa: BLE001
                came.append(error)
            finally:
                done.set()

        first, second = threading.Thread(target=edited), threading.Thread(target=plain)
        first.start()
        begun.wait(SECONDS)
        second.start()
        for thread in (second, first):
            thread.join(SECONDS)
        if first.is_alive() or second.is_alive():
            raise TimeoutError("a thread stood still")
        if isinstance(came[0], Exception):
            raise came[0]
        return {"output": one.head(came[0].output)} | ({"value": came[0][probe.site]} if read else {})

    def right() -> dict[str, Any]:
        output, seen = plain_run(one, given.plain, [probe])
        return {"output": one.head(output)} | ({"value": joined(probe, seen[probe.site])} if read else {})

    line = f"run({given.text}) beside a thread's edit of {probe.site}, read={read}"
    return Call("threads", line, Expect.EITHER, one, perform, right, only_run_shows=True)


def nested(rng: Random, one: Subject) -> Call:
    """A run of the same model inside an edit, a reduce or a hook."""
    given = one.draw(rng)
    probe = sample(rng, one, given, 1)[0]
    ways = ["edit", "reduce"] + (["hook"] if one.engine == "hooked" else [])
    way = rng.choice(ways)

    def perform() -> dict[str, Any]:
        inner: list[Any] = []

        def nest(value: Tensor, hook: Any = None) -> Tensor:
            if not inner:
                inner.append(None)
                inner[0] = one.model.run(given.ours, read=[probe.site])
            return torch.zeros_like(value)

        if way == "edit":
            outer = one.model.run(given.ours, edit=[mm.Edit(probe.site, nest)]).output
        elif way == "reduce":
            outer = one.model.run(given.ours, read=[mm.Read(probe.site, reduce=nest)]).output
        else:
            outer = one.model.run_with_hooks(**given.ours, fwd_hooks=[(probe.site, nest)])
        inside = {"output": one.head(inner[0].output), "value": inner[0][probe.site]}
        return inside | {"outer": one.head(outer)}

    def right() -> dict[str, Any]:
        output, seen = plain_run(one, given.plain, [probe])
        change = [] if way == "reduce" else [(probe, lambda call, value: torch.zeros_like(value))]
        outer = one.head(plain_run(one, given.plain, (), change)[0])
        return {"output": one.head(output), "value": joined(probe, seen[probe.site]), "outer": outer}

    line = f"run({given.text}) inside its own {way} at {probe.site}"
    return Call("nested", line, Expect.EITHER, one, perform, right, only_run_shows=True)


def two_models(rng: Random, one: Subject) -> Call:
    """A run of another model inside an edit: both as they are alone."""
    other = subject("dinov2" if one.name != "dinov2" else "siglip", one.engine)
    given, inside = one.draw(rng), other.draw(rng)
    probe, read = sample(rng, one, given, 1)[0], other.probes[0]

    def perform() -> dict[str, Any]:
        came: list[Any] = []

        def nest(value: Tensor) -> Tensor:
            came.append(other.model.run(inside.ours, read=[read.site]))
            return value * 0.5

        run = one.model.run(given.ours, edit=[mm.Edit(probe.site, nest)])
        return {"output": one.head(run.output), "inner": came[0][read.site]}

    def right() -> dict[str, Any]:
        output, _ = plain_run(one, given.plain, (), [(probe, lambda call, value: value * 0.5)])
        return {"output": one.head(output), "inner": plain_run(other, inside.plain, [read])[1][read.site][0]}

    line = f"{other.name} inside an edit of run({given.text}) at {probe.site}"
    return Call("two models", line, Expect.VALUE, one, perform, right)


KINDS = (Kind(threads, weight=0.5), Kind(nested, weight=0.5), Kind(two_models, weight=0.4))
