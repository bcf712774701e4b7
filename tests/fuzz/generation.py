"""Calls of `generate`, with reads, edits and options, and of models that generate nothing."""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from torch import Tensor

import mm_adapters as mm
from tests.fuzz import indices
from tests.fuzz.call import Call, Expect, Kind, OneOf
from tests.fuzz.probes import watched
from tests.fuzz.reads import MOVES, change_of, made, shown
from tests.fuzz.subjects import Subject, plain_run


def generating(rng: Random, subject: Subject) -> Call:
    """`generate`: the library's own tokens; with a read what plain hooks see, along the sequence."""
    given = subject.draw(rng)
    options = {"max_new_tokens": rng.choice([1, 3]), "do_sample": False} | rng.choice(
        [{}, {"use_cache": False}, {"num_beams": 2}]
    )
    if "num_beams" not in options:
        options["min_new_tokens"] = options["max_new_tokens"]
    probe = rng.choice([p for p in subject.probes if p.site.startswith("language")])
    way = rng.choice(["plain", "read", "edit"] if "num_beams" not in options else ["plain", "edit"])
    move = rng.choice(MOVES[:4])

    def perform() -> dict[str, Any]:
        if way == "plain":
            return {"tokens": subject.model.generate(**given.ours, **options)}
        if way == "edit":
            edit = mm.Edit(probe.site, move.fn)
            return {"tokens": subject.model.generate(**given.ours, edit=[edit], **options).output}
        run = subject.model.generate(**given.ours, read=[probe.site], **options)
        return {"tokens": run.output, "value": run[probe.site]}

    def right() -> dict[str, Any]:
        change = [(probe, change_of(move, None, None, None))] if way == "edit" else []
        with torch.no_grad(), watched(subject.plain, [probe], change) as seen:
            tokens = subject.plain.generate(**given.plain, **options)
        if way != "read":
            return {"tokens": tokens}
        values = seen[probe.site]
        if options.get("use_cache", True) or len(values) == 1:
            return {"tokens": tokens, "value": torch.cat(values, 1)}
        # Without a cache each call has the whole sequence again: the last alone, or one value a call.
        return {"tokens": tokens, "value": OneOf((values[-1], values, torch.cat(values, 1)))}

    what = {
        "plain": "",
        "read": f", read=[{probe.site!r}]",
        "edit": f", edit=[Edit({probe.site!r}, {move.text})]",
    }
    line = f"generate({given.text}, **{options}{what[way]})"
    either = way == "read" and not options.get("use_cache", True)
    return Call("generate", line, Expect.EITHER if either else Expect.VALUE, subject, perform, right)


_OF_GENERATION: tuple[tuple[str, Any], ...] = (
    ("max_new_token", 3), ("max_new_tokens", 0), ("max_new_tokens", -1), ("max_new_tokens", "a"),
    ("max_new_tokens", 1.5), ("temperature", "hot"), ("foo", 1), ("num_beam", 2), ("seed", 3),
    ("do_sampel", True), ("num_inference_steps", 3), ("texts", ["a"]), ("image", "picture"), ("num_beams", 0),
)  # fmt: skip


def bad_generation(rng: Random, subject: Subject) -> Call:
    """`generate` with options that mean nothing, or of a model that has no such thing."""
    given = subject.draw(rng)
    name, value = rng.choice(_OF_GENERATION)
    options = {"max_new_tokens": 2, "do_sample": False} | {name: value}
    read = [subject.probes[0].site] if rng.random() < 0.4 else []
    if not subject.generates:
        options, name, value, read = {"max_new_tokens": 2}, "(it does not generate)", "", []

    def perform() -> dict[str, Any]:
        more = {"read": read} if read else {}
        return {"tokens": subject.model.generate(**given.ours, **options, **more)}

    line = f"generate({given.text}, {name}={value!r}, read={read})"
    return Call("bad generation", line, Expect.REFUSAL, subject, perform)


def positions_of_generation(rng: Random, subject: Subject) -> Call:
    """An edit in `generate` at positions of the prompt: what a plain hook in the first call gives."""
    given = subject.draw(rng)
    probe = rng.choice([p for p in subject.probes if p.site.startswith("language")])
    length = plain_run(subject, given.plain, [probe])[1][probe.site][0].shape[1]
    positions = indices.valid(rng, length, "positions")
    while positions.or_refused:
        positions = indices.valid(rng, length, "positions")
    move, options = rng.choice(MOVES[:4]), {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}

    def perform() -> dict[str, Any]:
        edit = mm.Edit(probe.site, move.fn, **made(positions=positions))
        return {"tokens": subject.model.generate(**given.ours, edit=[edit], **options).output}

    def right() -> dict[str, Any]:
        inner = change_of(move, None, positions, None)

        def first(call: int, value: Tensor) -> Tensor:
            return inner(call, value) if call == 0 else value

        with torch.no_grad(), watched(subject.plain, [], [(probe, first)]):
            return {"tokens": subject.plain.generate(**given.plain, **options)}

    what = f"edit=[Edit({probe.site!r}, {move.text}{shown(positions=positions)})]"
    return Call("generate", f"generate({given.text}, {what})", Expect.VALUE, subject, perform, right)


KINDS = (
    Kind(generating, fits=lambda s: s.generates, weight=1.5),
    Kind(positions_of_generation, fits=lambda s: s.generates, weight=0.7),
    Kind(bad_generation, fits=lambda s: not s.is_pipeline, weight=0.6),
)
