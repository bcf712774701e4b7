"""Calls that misuse an entry point: what is not in a list, no function, no tensor, or does not exist."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor

import mm_adapters as mm
from tests.fuzz.call import Call, Expect, Kind, Mine, Stop
from tests.fuzz.reads import REDUCES, joined, sample
from tests.fuzz.subjects import Given, Subject, plain_run

BAD_MOVES: tuple[tuple[str, Any], ...] = (
    ("lambda v: None", lambda v: None),
    ("lambda v: v[:, :1]", lambda v: v[:, :1]),
    ("lambda v: v.mean(0, True).mean(1, True)", lambda v: v.mean(0, True).mean(1, True)),
    ("lambda v: v.sum()", lambda v: v.sum()),
    ("lambda v: v[None]", lambda v: v[None]),
    ("lambda v: v * 1j", lambda v: v * 1j),
    ("lambda v: v * nan", lambda v: v * float("nan")),
    ("lambda v: v / 0", lambda v: v / 0 * 0),
    ("lambda v: v.numpy()", lambda v: v.detach().numpy()),
    ("lambda v: 0.0", lambda v: 0.0),
    ("lambda v: (v,)", lambda v: (v,)),
    ("lambda v: 'v'", lambda v: "v"),
)
NO_FUNCTIONS: tuple[tuple[str, Any], ...] = (
    ("3", 3), ("None", None), ("torch.zeros(1)", torch.zeros(1)), ("'zeros'", "zeros"),
)  # fmt: skip
BAD_REDUCES: tuple[tuple[str, Any], ...] = (
    ("lambda v: None", lambda v: None),
    ("lambda v: v.sum().item()", lambda v: v.sum().item()),
    ("lambda v: (v, v)", lambda v: (v, v)),
    ("lambda v: v.numpy()", lambda v: v.detach().numpy()),
    ("'mean'", "mean"),
)


def _first(run: Any, subject: Subject) -> dict[str, Any]:
    return {"output": subject.head(run.output)} | dict(run.values)


def bad_move(rng: Random, subject: Subject) -> Call:
    """An edit whose function gives no value of the site's."""
    given, raises = subject.draw(rng), rng.random() < 0.15
    probe = sample(rng, subject, given, 1)[0]
    shown, fn = rng.choice(BAD_MOVES)
    expect, late = Expect.REFUSAL, True
    if raises:
        mine = rng.choice([Mine, Stop])
        shown, expect = f"raise {mine.__name__}", Expect.OWN_ERROR

        def fn(value: Tensor) -> Tensor:
            raise mine("mine")

    elif rng.random() < 0.15:
        (shown, fn), late = rng.choice(NO_FUNCTIONS), False
    # A hook of TransformerLens' may return None, which changes nothing, and numbers that are none.
    for_hooks = not any(part in shown for part in ("None", "nan", "/ 0"))
    hooks = subject.engine == "hooked" and late and rng.random() < 0.35 and for_hooks

    def perform() -> dict[str, Any]:
        if hooks:
            hook = (probe.site, lambda value, hook: fn(value))
            return {"output": subject.head(subject.model.run_with_hooks(**given.ours, fwd_hooks=[hook]))}
        return _first(subject.model.run(given.ours, edit=[mm.Edit(probe.site, fn)]), subject)

    what = f"edit=[Edit({probe.site!r}, {shown})]"
    if hooks:
        what = f"fwd_hooks=[({probe.site!r}, lambda v, hook: ({shown})(v))]"
    kind = "raises" if raises else "bad hook" if hooks else "bad edit function"
    return Call(kind, f"run({given.text}, {what})", expect, subject, perform, only_run_shows=late)


def bad_reduce(rng: Random, subject: Subject) -> Call:
    """A reduce that gives no tensor, raises, or writes into the value."""
    given = subject.draw(rng)
    probe = sample(rng, subject, given, 1)[0]
    if rng.random() < 0.4:
        return _reduce_in_place(subject, given, probe)
    shown, reduce = rng.choice(BAD_REDUCES)
    expect = Expect.REFUSAL
    if rng.random() < 0.2:
        shown, expect = "raise Mine", Expect.OWN_ERROR

        def reduce(value: Tensor) -> Tensor:
            raise Mine("mine")

    def perform() -> dict[str, Any]:
        return _first(subject.model.run(given.ours, read=[mm.Read(probe.site, reduce=reduce)]), subject)

    line = f"run({given.text}, read=[Read({probe.site!r}, reduce={shown})])"
    return Call("bad reduce", line, expect, subject, perform, only_run_shows=callable(reduce))


def _reduce_in_place(subject: Subject, given: Given, probe: Any) -> Call:
    def perform() -> dict[str, Any]:
        run = subject.model.run(given.ours, read=[mm.Read(probe.site, reduce=lambda v: v.mul_(2).sum(-1))])
        return {"output": subject.head(run.output), "value": run[probe.site]}

    def right() -> dict[str, Any]:
        output, seen = plain_run(subject, given.plain, [probe])
        value = joined(probe, [(v * 2).sum(-1) for v in seen[probe.site]])
        return {"output": subject.head(output), "value": value}

    line = f"run({given.text}, read=[Read({probe.site!r}, reduce=lambda v: v.mul_(2).sum(-1))])"
    return Call("reduce in place", line, Expect.EITHER, subject, perform, right, only_run_shows=True)


def _misspelt(rng: Random, site: str) -> str:
    at = rng.randrange(len(site))
    return rng.choice(
        [site[:at] + site[at + 1 :], site + "s", site.replace("hook_", "hok_"), site.replace(".1.", ".99."),
         "nosuch." + site.partition(".")[2], "", site.partition(".")[2]]
    )  # fmt: skip


def unknown_site(rng: Random, subject: Subject) -> Call:
    """A site there is none of, by every entry point."""
    given, site = subject.draw(rng), rng.choice(subject.probes).site
    name = _misspelt(rng, site)
    if name == site or name in subject.model.sitemap.sites:
        name = site + "_"
    ways: dict[str, Callable[[], Any]] = {
        "read": lambda: subject.model.run(given.ours, read=[name]),
        "Read": lambda: subject.model.run(given.ours, read=[site, mm.Read(name)]),
        "edit": lambda: subject.model.run(given.ours, edit=[mm.Edit(name, torch.zeros_like)]),
    }
    if subject.engine == "hooked":
        ways["names_filter"] = lambda: subject.model.run_with_cache(**given.ours, names_filter=[name])
        ways["fwd_hooks"] = lambda: subject.model.run_with_hooks(
            **given.ours, fwd_hooks=[(name, lambda v, hook: v)]
        )
        ways["add_hook"] = lambda: subject.model.add_hook(name, lambda v, hook: v)
    else:
        ways["site"] = lambda: subject.model.envoy(name)
    way = rng.choice(sorted(ways))

    def perform() -> dict[str, Any]:
        return {"answer": str(type(ways[way]()))}

    return Call("unknown site", f"{way} {name!r} of {given.text}", Expect.REFUSAL, subject, perform)


def bad_arguments(rng: Random, subject: Subject) -> Call:
    """Reads, edits and inputs of other types than an entry point takes."""
    given = subject.draw(rng)
    site, model = sample(rng, subject, given, 1)[0].site, subject.model
    edit, read = mm.Edit(site, torch.zeros_like), mm.Read(site)
    ways: dict[str, Callable[[], Any]] = {
        "edit=Edit(site, ...)": lambda: model.run(given.ours, edit=edit),
        "read=Read(site)": lambda: model.run(given.ours, read=read),
        "read='site'": lambda: model.run(given.ours, read=site),
        "read=[edit]": lambda: model.run(given.ours, read=[edit]),
        "edit=[read]": lambda: model.run(given.ours, edit=[read]),
        "edit=['site']": lambda: model.run(given.ours, edit=[site]),
        "edit=[(site, fn)]": lambda: model.run(given.ours, edit=[(site, torch.zeros_like)]),
        "read=[3]": lambda: model.run(given.ours, read=[3]),
        "read=[None]": lambda: model.run(given.ours, read=[None]),
        "read=[Read(None)]": lambda: model.run(given.ours, read=[mm.Read(None)]),  # type: ignore[arg-type]
        "read=[[site]]": lambda: model.run(given.ours, read=[[site]]),
        "read=3": lambda: model.run(given.ours, read=3),
        "read=[site, site]": lambda: model.run(given.ours, read=[site, site]),
        "inputs='a'": lambda: model.run("a red circle", read=[site]),
        "inputs=[..]": lambda: model.run(["a red circle"], read=[site]),
        "inputs=None": lambda: model.run(None, read=[site]),
        "inputs={}": lambda: model.run({}, read=[site]),
        "inputs={1: 2}": lambda: model.run({1: 2}, read=[site]),
        "reads=[site]": lambda: model.run(given.ours, reads=[site]),
    }
    if subject.engine == "hooked":
        ways |= {
            "fwd_hooks=hook": lambda: model.run_with_hooks(**given.ours, fwd_hooks=(site, torch.zeros_like)),
            "fwd_hooks=[site]": lambda: model.run_with_hooks(**given.ours, fwd_hooks=[site]),
            "fwd_hooks=[(site, 3)]": lambda: model.run_with_hooks(**given.ours, fwd_hooks=[(site, 3)]),
            "names_filter=3": lambda: model.run_with_cache(**given.ours, names_filter=3),
            "names_filter=[3]": lambda: model.run_with_cache(**given.ours, names_filter=[3]),
            "stop_at_layer=1": lambda: model.run_with_cache(**given.ours, stop_at_layer=1),
            "run_with_cache(foo=1)": lambda: model.run_with_cache(**given.ours, foo=1),
            "run_with_cache(device='nosuch')": lambda: model.run_with_cache(**given.ours, device="nosuch"),
        }
    way = rng.choice(sorted(ways))
    if way == "reads=[site]":  # Python's own error says it as well as any.
        way = "read=[site, site]"

    def perform() -> dict[str, Any]:
        return {"answer": str(type(ways[way]()))}

    return Call("bad argument", f"{way} at {site} of {given.text}", Expect.REFUSAL, subject, perform)


def never_runs(rng: Random, subject: Subject) -> Call:
    """A site whose module does not run with these inputs."""
    given, model = subject.draw(rng), subject.model
    if subject.is_pipeline:
        inputs, sites = given.ours, [s for s in model.sitemap.sites if s.startswith("vae.enc")]
        site = rng.choice(sites) if sites else "vae.hook_nothing"
    else:
        inputs = {"text": given.ours["text"]} if "text" in given.ours else {
            k: v for k, v in given.ours.items() if k in ("input_ids", "attention_mask")
        }  # fmt: skip
        if subject.kind == "vlm":
            inputs = dict(model.prepare(text=["hello there"]))
        site = next(p.site for p in subject.probes if p.needs == "images")
    ways: dict[str, Callable[[], Any]] = {
        "read": lambda: model.run(inputs, read=[site]),
        "reduced read": lambda: model.run(inputs, read=[mm.Read(site, reduce=REDUCES[0][1])]),
        "edit": lambda: model.run(inputs, edit=[mm.Edit(site, torch.zeros_like)]),
    }
    if subject.engine == "hooked":
        ways["fwd_hooks"] = lambda: model.run_with_hooks(**inputs, fwd_hooks=[(site, lambda v, hook: v * 0)])
        ways["names_filter"] = lambda: model.run_with_cache(**inputs, names_filter=[site])
    way = rng.choice(sorted(ways))

    def perform() -> dict[str, Any]:
        return {"answer": str(type(ways[way]()))}

    line = f"{way} of {site}, given {sorted(inputs)}"
    return Call("never runs", line, Expect.REFUSAL, subject, perform, only_run_shows=True)


KINDS = (
    Kind(bad_move, weight=1.5),
    Kind(bad_reduce, weight=1),
    Kind(unknown_site, weight=0.8),
    Kind(bad_arguments, weight=1),
    Kind(never_runs, fits=lambda s: s.raw, weight=0.5),
)
