"""The nodes of a model's graph: what its towers read, their heads, their MLPs, what joins two towers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mm_adapters import InputError, MissingSiteError, Model, TowerView

NodeKind = Literal["input", "head", "cross", "mlp", "projector"]
_ATTENTIONS: dict[str, tuple[NodeKind, str]] = {"attn": ("head", "a"), "cross_attn": ("cross", "c")}
_PREFIX = {"vision": "v.", "text": "t.", "language": "", "denoiser": "d."}


@dataclass(frozen=True)
class Node:
    """One node: a site, one head of it (None: all), and the sampling steps at which it counts (None: all).

    One that is `beside_images` is its site where no image stands: images come from elsewhere.
    """

    name: str
    kind: NodeKind
    tower: str
    layer: int
    site: str
    head: int | None = None
    steps: tuple[int, ...] | None = None
    beside_images: bool = False


def circuit_nodes(
    model: Model,
    *,
    towers: Sequence[str] | None = None,
    steps: Sequence[Sequence[int]] | None = None,
) -> tuple[Node, ...]:
    """The nodes of these towers (None: all that have blocks), in the order they run.

    The names are MIB's with the tower before them: "v." vision, "t." text, "d." a denoiser, none for a
    language tower: "v.input", "v.a1.h3" (a head's z), "v.m1" (an MLP), "c1.h0" (a head of cross-attention),
    "p" (the projector), "input" (a language tower's own embedded tokens, without images). A layer
    whose heads cannot be told apart is one node, "a1". With step groups each node of a denoiser is one for
    each group, "d.c0.h1@2", whose steps these are.

    Source: Mueller et al. 2025, arXiv 2504.13151 (MIB), appendix; Hanna et al. 2024, arXiv 2403.17806.
    Raises: MissingSiteError if there is no such tower, or none with blocks.
    """
    views = [model.check_tower(name) for name in (model.towers if towers is None else towers)]
    present = {site.name for site in model.sites() if site.reason is None}
    nodes = [node for view in views for node in _of_tower(model, view, present)]
    if not any(node.kind in ("head", "mlp", "cross") for node in nodes):
        raise MissingSiteError(
            f"{model.name}: {', '.join(v.name for v in views)} have no blocks with *.attn.hook_z, "
            "*.hook_attn_out or *.hook_mlp_out, so there are no nodes."
        )
    return tuple(part for node in nodes for part in _in_steps(model, node, steps))


def select_nodes(nodes: Sequence[Node], names: Sequence[str]) -> tuple[Node, ...]:
    """The nodes of these names. Raises: InputError for a name that none has."""
    by_name = {node.name: node for node in nodes}
    missing = [name for name in names if name not in by_name]
    if missing:
        raise InputError(f"There is no node {missing[0]!r}; there is {', '.join(list(by_name)[:12])}, ...")
    return tuple(by_name[name] for name in names)


def prefix_of(view: TowerView) -> str:
    """What stands before the names of a tower's nodes."""
    known = _PREFIX.get(view.role)
    if known is None:
        return f"{view.name}."
    number = view.name.removeprefix(view.role)
    return f"{known.removesuffix('.')}{number}." if number else known


def _of_tower(model: Model, view: TowerView, present: set[str]) -> Iterator[Node]:
    prefix, name = prefix_of(view), view.name
    if view.role == "projector":
        site = f"{name}.hook_out"
        if site in present:
            yield Node("p" if name == "projector" else prefix + "p", "projector", name, 0, site)
    if view.role == "vae":
        return
    entry = _entry(view, present)
    if entry is not None:
        merged = view.role == "language" and any(t.role == "vision" for t in model.towers.values())
        yield Node(f"{prefix}input", "input", name, -1, entry, beside_images=merged)
    for stack in view.stacks:
        start = prefix if stack == "blocks" else f"{prefix}{stack}."
        for layer in range(view.n_layers(stack)):
            block = f"{name}.{stack}.{layer}"
            for attention, (kind, letter) in _ATTENTIONS.items():
                here = Node(f"{start}{letter}{layer}", kind, name, layer, f"{block}.{attention}.hook_z")
                yield from _heads(model, here, f"{block}.hook_{attention}_out", present)
            if f"{block}.hook_mlp_out" in present:
                yield Node(f"{start}m{layer}", "mlp", name, layer, f"{block}.hook_mlp_out")


def _heads(model: Model, node: Node, out: str, present: set[str]) -> Iterator[Node]:
    """A node for each head of an attention's z; one for its output if that has no heads."""
    n_heads = model.check_site(node.site).n_heads if node.site in present else None
    if n_heads is not None:
        yield from (replace(node, name=f"{node.name}.h{head}", head=head) for head in range(n_heads))
    elif out in present:
        yield replace(node, site=out)


def _entry(view: TowerView, present: set[str]) -> str | None:
    """Where what a tower reads comes in: its tokens alone where images are put among them later."""
    if view.role in ("denoiser", "projector"):
        return None
    embed, first = f"{view.name}.hook_embed", f"{view.name}.blocks.0.hook_resid_pre"
    order = (embed, first) if view.role == "language" else (first, embed)
    return next((site for site in order if site in present), None)


def _in_steps(model: Model, node: Node, steps: Sequence[Sequence[int]] | None) -> Iterator[Node]:
    if steps is None or node.tower not in model.loops():
        yield node
        return
    for number, group in enumerate(steps):
        yield replace(node, name=f"{node.name}@{number}", steps=tuple(group))
