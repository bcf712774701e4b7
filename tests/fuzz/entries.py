"""The other ways in: caches, TransformerLens hooks, traces, towers, layouts."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.call import Call, Expect, Kind
from tests.fuzz.probes import Change
from tests.fuzz.reads import MOVES, change_of, joined, sample
from tests.fuzz.subjects import Subject, plain_run


def caching(rng: Random, subject: Subject) -> Call:
    """`run_with_cache` with every sort of filter: what plain hooks see."""
    given = subject.draw(rng)
    probes = sample(rng, subject, given, 3)
    names = [p.site for p in probes]
    flat = given.rows == 1 and not any(p.loop for p in probes) and not subject.is_pipeline
    remove = flat and rng.random() < 0.5
    forms: list[tuple[str, Any]] = [
        (f"{names}", names), ("lambda name: name in names", lambda name: name in names), ("None", None),
    ]  # fmt: skip
    if len(names) == 1:
        forms.append((repr(names[0]), names[0]))
    text, names_filter = rng.choice(forms)

    def perform() -> dict[str, Any]:
        more = {"remove_batch_dim": True} if remove else {}
        output, cache = subject.model.run_with_cache(**given.ours, names_filter=names_filter, **more)
        values = {"output": subject.head(output)} | {n: cache[n] for n in names}
        return values if names_filter is None else values | {"names": sorted(cache.keys())}

    def right() -> dict[str, Any]:
        output, seen = plain_run(subject, given.plain, probes)
        values: dict[str, Any] = {"output": subject.head(output)}
        for probe in probes:
            value = joined(probe, seen[probe.site])
            values[probe.site] = value[0] if remove else value
        return values if names_filter is None else values | {"names": sorted(names)}

    line = f"run_with_cache({given.text}, names_filter={text}, remove_batch_dim={remove})"
    return Call("cache", line, Expect.VALUE, subject, perform, right)


def _with_hooks(model: Any, given: dict[str, Any], hook: tuple[str, Any]) -> Any:
    with torch.no_grad(), model.hooks(fwd_hooks=[hook]):
        return model(**given)


def _with_add_hook(model: Any, given: dict[str, Any], hook: tuple[str, Any]) -> Any:
    model.add_hook(*hook)
    try:
        with torch.no_grad():
            return model(**given)
    finally:
        model.reset_hooks()


HOOK_WAYS: dict[str, Callable[[Any, dict[str, Any], tuple[str, Any]], Any]] = {
    "run_with_hooks": lambda model, given, hook: model.run_with_hooks(**given, fwd_hooks=[hook]),
    "hooks": _with_hooks,
    "add_hook": _with_add_hook,
}


def hooking(rng: Random, subject: Subject) -> Call:
    """`run_with_hooks`: what the same plain hook gives. A hook that returns None changes nothing."""
    given = subject.draw(rng)
    probe = sample(rng, subject, given, 1)[0]
    nothing = rng.random() < 0.25
    move = rng.choice([m for m in MOVES if "double" not in m.text])
    way = rng.choice(sorted(HOOK_WAYS))
    seen: list[Tensor] = []

    def look(value: Tensor, hook: Any) -> None:
        seen.append(value.detach().clone())

    def perform() -> dict[str, Any]:
        seen.clear()
        hook: Any = look if nothing else lambda value, hook: move.fn(value)
        output = HOOK_WAYS[way](subject.model, given.ours, (probe.site, hook))
        return {"output": subject.head(output)} | ({"value": torch.cat(seen)} if nothing else {})

    def right() -> dict[str, Any]:
        change = [] if nothing else [(probe, change_of(move, None, None, None))]
        output, kept = plain_run(subject, given.plain, [probe] if nothing else [], change)
        values = {"output": subject.head(output)}
        return values | ({"value": torch.cat(kept[probe.site])} if nothing else {})

    what = "lambda v, hook: None" if nothing else move.text
    line = f"{way}({given.text}, fwd_hooks=[({probe.site!r}, {what})])"
    return Call("hook", line, Expect.VALUE, subject, perform, right)


def tracing(rng: Random, subject: Subject) -> Call:
    """A `with model.trace(...)` block that saves a site, perhaps after writing into it."""
    given = subject.draw(rng)
    probe = sample(rng, subject, given, 1)[0]
    edits = rng.random() < 0.5 and not probe.loop
    model, site, ours = subject.model, probe.site, given.ours
    if subject.is_pipeline:
        ours = ours | {"num_inference_steps": 1}

    def perform() -> dict[str, Any]:
        if edits:
            with model.trace(**ours) as tracer:
                model.site(site)[:] = 0
                value = model.site(site).save()
                result = tracer.result.save()
        else:
            with model.trace(**ours) as tracer:
                value = model.site(site).save()
                result = tracer.result.save()
        return {"output": subject.head(result), "value": value}

    def right() -> dict[str, Any]:
        plain = given.plain | ({"num_inference_steps": 1} if subject.is_pipeline else {})
        # In a trace a site is its first call's, of a text tower that is called for each prompt too.
        zeroed: Change = lambda call, value: value if call else torch.zeros_like(value)  # noqa: E731
        change = [(probe, zeroed)] if edits else []
        output, seen = plain_run(subject, plain, [probe], change)
        return {"output": subject.head(output), "value": seen[site][0]}

    line = f"with trace({given.text}): site({site!r}){'[:] = 0' if edits else '.save()'}"
    return Call("trace", line, Expect.VALUE, subject, perform, right)


def laying_out(rng: Random, subject: Subject) -> Call:
    """`layout`: where the model's own tokens of an image and its own padding are."""
    given = subject.draw(rng)
    tower = "language" if subject.kind == "vlm" else "text"

    def perform() -> dict[str, Any]:
        layout = subject.model.layout(**given.ours)[tower]
        image = {"image": layout.mask("image")} if tower == "language" else {}
        return {"pad": layout.mask("pad")} | image

    def right() -> dict[str, Any]:
        ids, config = given.plain["input_ids"], subject.plain.config
        values = {"pad": given.plain["attention_mask"] == 0}
        if tower == "language":
            values["image"] = ids == getattr(config, "image_token_id", None)
        return values

    return Call("layout", f"layout({given.text})", Expect.VALUE, subject, perform, right)


def of_a_tower(rng: Random, subject: Subject) -> Call:
    """A tower's own `run_with_cache`, under local names."""
    given = subject.draw(rng)
    vision = [p for p in subject.probes if p.site.startswith("vision")]
    probe = rng.choice(vision)
    local = probe.site.partition(".")[2]
    pixels = given.plain["pixel_values"]

    def perform() -> dict[str, Any]:
        _, cache = subject.model.vision.run_with_cache(pixels, names_filter=local)
        return {"value": cache[local]}

    def right() -> dict[str, Any]:
        return {"value": plain_run(subject, given.plain, [probe])[1][probe.site][0]}

    return Call(
        "tower cache", f"vision.run_with_cache({given.text}, {local})", Expect.VALUE, subject, perform, right
    )


_HOOKED: Callable[[Subject], bool] = lambda s: s.engine == "hooked"  # noqa: E731
KINDS = (
    Kind(caching, fits=_HOOKED, weight=2.5),
    Kind(hooking, fits=_HOOKED, weight=2),
    Kind(tracing, fits=lambda s: s.engine == "nnsight", weight=3),
    Kind(laying_out, fits=lambda s: s.name in ("tiny-clip", "tiny-llava"), weight=0.7),
    Kind(of_a_tower, fits=lambda s: _HOOKED(s) and s.name in ("tiny-clip", "dinov2", "siglip"), weight=1),
)
