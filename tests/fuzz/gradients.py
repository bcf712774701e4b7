"""Calls that ask for gradients, of scalars of the output and of what is none."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor

import mm_adapters as mm
from tests.fuzz.call import Call, Expect, Kind, Mine
from tests.fuzz.reads import (
    MOVES,
    REDUCES,
    change_of,
    joined,
    made,
    picked,
    rows_of,
    sample,
    shown,
    steps_of,
)
from tests.fuzz.subjects import Given, Subject, plain_run

Scalar = tuple[str, Callable[[Tensor], Any]]
SCALARS: tuple[Scalar, ...] = (
    ("x.square().mean()", lambda x: x.float().square().mean()),
    ("x.flatten()[-1]", lambda x: x.flatten()[-1]),
    ("x[0].sum()", lambda x: x[0].sum()),
    ("x.sum().reshape(1)", lambda x: x.sum().reshape(1)),
    ("x.double().abs().mean()", lambda x: x.double().abs().mean()),
)
NO_SCALARS: tuple[Scalar, ...] = (
    ("float(x.sum())", lambda x: float(x.sum())),
    ("None", lambda x: None),
    ("x.detach().sum()", lambda x: x.detach().sum()),
    ("torch.cat([x, x])", lambda x: torch.cat([x, x])),
    ("x.flatten()[:0]", lambda x: x.flatten()[:0]),
    ("x.sum() * 1j", lambda x: x.sum() * 1j),
    ("torch.ones((), requires_grad=True) * 3", lambda x: torch.ones((), requires_grad=True) * 3),
    ("x.argmax()", lambda x: x.argmax()),
    ("[x.sum()]", lambda x: [x.sum()]),
    ("'loss'", lambda x: "loss"),
    ("x.sum().item()", lambda x: x.sum().item()),
    ("x.sum().detach().numpy()", lambda x: x.sum().detach().numpy()),
    ("torch.tensor(1.0)", lambda x: torch.tensor(1.0)),
    ("x.sum() > 0", lambda x: x.sum() > 0),
)


def _smooth(subject: Subject, arguments: dict[str, Any]) -> dict[str, Any]:
    return arguments | subject.smooth


def _differentiable(subject: Subject, given: Given) -> Given:
    from dataclasses import replace

    text = f"{given.text} | {subject.smooth}" if subject.smooth else given.text
    return replace(given, ours=_smooth(subject, given.ours), plain=_smooth(subject, given.plain), text=text)


def asking(rng: Random, subject: Subject) -> Call:
    """Gradients at some rows of one or two sites, perhaps of an edited run."""
    given = _differentiable(subject, subject.draw(rng))
    plan = [(p, rows_of(rng, p, given), steps_of(rng, p, given)) for p in sample(rng, subject, given)]
    text, scalar = rng.choice(SCALARS)
    edited = rng.choice(sample(rng, subject, given)) if rng.random() < 0.25 else None
    move = rng.choice([m for m in MOVES if m.text in ("lambda v: v * 0.5", "lambda v: -v")])
    head = subject.head

    def perform() -> dict[str, Any]:
        run = subject.model.run(
            given.ours,
            read=[mm.Read(p.site, **made(rows=rows, steps=steps)) for p, rows, steps in plan],
            edit=[mm.Edit(edited.site, move.fn)] if edited else [],
            grad_of=lambda o: scalar(head(o)),
        )
        values = {f"value of {p.site}": run[p.site] for p, *_ in plan}
        return values | {f"gradient at {p.site}": run.grads[p.site] for p, *_ in plan}

    def right() -> dict[str, Any]:
        change = [(edited, change_of(move, None, None, None))] if edited else []
        probes = [p for p, *_ in plan]
        output, seen = plain_run(subject, given.plain, probes, change, follow=True)
        flat = [v for p in probes for v in seen[p.site]]
        got = iter(torch.autograd.grad(scalar(head(output)).sum(), flat, allow_unused=True))
        values: dict[str, Any] = {}
        for probe, rows, steps in plan:
            at = rows.means if rows else None
            grads = [next(got) for _ in seen[probe.site]]
            filled = [
                torch.zeros_like(v) if g is None else g for v, g in zip(seen[probe.site], grads, strict=True)
            ]
            of = steps.means if steps else None
            values[f"value of {probe.site}"] = joined(probe, [picked(v, at) for v in seen[probe.site]], of)
            values[f"gradient at {probe.site}"] = joined(probe, [picked(g, at) for g in filled], of)
        return values

    reads = ", ".join(f"Read({p.site!r}{shown(rows=r, steps=s)})" for p, r, s in plan)
    edits = f", edit=[Edit({edited.site!r}, {move.text})]" if edited else ""
    either = any(i is not None and i.or_refused for _, r, s in plan for i in (r, s))
    line = f"run({given.text}, read=[{reads}]{edits}, grad_of=lambda o: {text})"
    return Call("gradient", line, Expect.EITHER if either else Expect.VALUE, subject, perform, right)


def under_a_mode(rng: Random, subject: Subject) -> Call:
    """Under no_grad or inference_mode: reads as ever, gradients all the same or refused."""
    given = _differentiable(subject, subject.draw(rng))
    probe = sample(rng, subject, given, 1)[0]
    name, mode = rng.choice([("no_grad", torch.no_grad), ("inference_mode", torch.inference_mode)])
    grad = rng.random() < 0.6
    text, scalar = rng.choice(SCALARS)
    head = subject.head

    def perform() -> dict[str, Any]:
        with mode():
            if not grad:
                run = subject.model.run(given.ours, read=[probe.site])
                return {"output": head(run.output), "value": run[probe.site]}
            run = subject.model.run(given.ours, read=[probe.site], grad_of=lambda o: scalar(head(o)))
            return {"value": run[probe.site], "gradient": run.grads[probe.site]}

    def right() -> dict[str, Any]:
        output, seen = plain_run(subject, given.plain, [probe], follow=grad)
        value = joined(probe, seen[probe.site])
        if not grad:
            return {"output": head(output), "value": value}
        got = torch.autograd.grad(scalar(head(output)).sum(), seen[probe.site], allow_unused=True)
        filled = [torch.zeros_like(v) if g is None else g for v, g in zip(seen[probe.site], got, strict=True)]
        return {"value": value, "gradient": joined(probe, filled)}

    asked = f", grad_of=lambda o: {text}" if grad else ""
    line = f"with torch.{name}(): run({given.text}, read=[{probe.site!r}]{asked})"
    expect = Expect.EITHER if grad else Expect.VALUE
    return Call(f"under {name}", line, expect, subject, perform, right)


def _raises(output: Any) -> Tensor:
    raise Mine("mine")


def of_no_scalar(rng: Random, subject: Subject) -> Call:
    """grad_of gives what has no derivative, is not called, or raises."""
    given = _differentiable(subject, subject.draw(rng))
    probe = sample(rng, subject, given, 1)[0]
    text, scalar = rng.choice(NO_SCALARS)
    head, expect, late = subject.head, Expect.REFUSAL, True
    read: Any = [probe.site]
    shown_read = f"[{probe.site!r}]"
    grad_of: Any = lambda o: scalar(head(o))  # noqa: E731
    chance = rng.random()
    if chance < 0.1:
        text, grad_of, late = "not a function: 3", 3, False
    elif chance < 0.2:
        text, expect = "raise Mine", Expect.OWN_ERROR

        grad_of = _raises
    elif chance < 0.4:
        reduce = rng.choice(REDUCES)
        read, late = [mm.Read(probe.site, reduce=reduce[1])], False
        shown_read = f"[Read({probe.site!r}, reduce={reduce[0]})]"
        text, grad_of = "x.sum()", lambda o: head(o).sum()

    def perform() -> dict[str, Any]:
        run = subject.model.run(given.ours, read=read, grad_of=grad_of)
        return {"gradient": run.grads.get(probe.site)}

    line = f"run({given.text}, read={shown_read}, grad_of=lambda o: {text})"
    return Call("bad grad_of", line, expect, subject, perform, only_run_shows=late)


def of_another_tower(rng: Random, subject: Subject) -> Call:
    """The gradient at a vision site of what the text tower alone gives, and the other way round."""
    given = subject.draw(rng)
    text, embeds = rng.choice(
        [("text_embeds", lambda o: o.text_embeds.sum()), ("image_embeds", lambda o: o.image_embeds.sum())]
    )
    tower = "vision" if text == "text_embeds" else "text"
    site = next(p.site for p in subject.probes if p.site.startswith(tower))

    def perform() -> dict[str, Any]:
        run = subject.model.run(given.ours, read=[site], grad_of=embeds)
        told = site in getattr(run, "unused", ())
        return {} if told else {"gradient": run.grads.get(site)}

    line = f"run({given.text}, read=[{site!r}], grad_of=lambda o: o.{text}.sum())"
    return Call("unrelated gradient", line, Expect.REFUSAL, subject, perform, only_run_shows=True)


KINDS = (
    Kind(asking, weight=2.5),
    Kind(under_a_mode, weight=0.7),
    Kind(of_no_scalar, weight=1.5),
    Kind(of_another_tower, fits=lambda s: s.kind == "contrastive", weight=0.6),
)
