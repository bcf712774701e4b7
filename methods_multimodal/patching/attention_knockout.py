"""What a model answers when some positions cannot attend to some others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from methods_multimodal.core.blocked_attention import AttentionLeft, verify
from methods_multimodal.core.kept import kept
from methods_multimodal.core.model import check_sites, prepared_once
from methods_multimodal.core.record import Record
from methods_multimodal.core.running import State, run_steps
from mm_adapters import Edit, InputError, Model, Read

Metric = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Cut:
    """Which attention is blocked: of `queries` [row, pos] to `keys` [row, pos].

    Args:
        name: What to call it in the record.
        queries: The positions that cannot attend.
        keys: What they cannot attend to; of a cross-attention the positions of what it reads (None: all).
        layers: The layers in which it is blocked (None: all that have such an attention).
        heads: The heads (None: all).
        attention: "attn" or "cross_attn".
    """

    name: str
    queries: Bool[Tensor, "row query"]
    keys: Bool[Tensor, "row key"] | None
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    attention: str = "attn"

    def blocked(self, pattern: Float[Tensor, "row head query key"]) -> Bool[Tensor, "row head query key"]:
        """Where attention is blocked, as wide as a pattern. A position goes on attending to itself."""
        n_heads, n_keys = pattern.shape[1], pattern.shape[3]
        keys = torch.ones(len(self.queries), n_keys, dtype=torch.bool) if self.keys is None else self.keys
        where = self.queries[:, None, :, None].to(pattern.device) & keys[:, None, None, :].to(pattern.device)
        if self.attention == "attn":
            where = where & ~torch.eye(n_keys, dtype=torch.bool, device=pattern.device)
        if self.heads is not None:
            of_heads = torch.zeros(n_heads, dtype=torch.bool, device=pattern.device)
            of_heads[list(self.heads)] = True
            where = where & of_heads[None, :, None, None]
        return where.expand(pattern.shape)


@dataclass(frozen=True)
class Knockout(Record):
    """The metric of each row without each cut's attention, and what that attention was.

    `base` is the metric of the run in which nothing is blocked, and `mass` how much attention a query of the
    cut gave to its keys there, the mean over queries, heads and layers: a control may have had less.
    """

    values: Float[Tensor, "cut row"]
    base: Float[Tensor, " row"]
    mass: Float[Tensor, "cut row"]
    names: tuple[str, ...]
    layers: tuple[tuple[int, ...], ...]
    tower: str

    @property
    def effect(self) -> Float[Tensor, "cut row"]:
        """How far each cut moves the metric."""
        return self.values - self.base


@dataclass
class _Blocker:
    """The edits of one cut, and what is left of the attention that it blocks."""

    cut: Cut
    sites: Sequence[str]
    left: dict[str, AttentionLeft] = field(default_factory=dict)
    dead: dict[str, Tensor] = field(default_factory=dict)

    def edits(self) -> list[Edit]:
        """Scores to minus infinity; the pattern is looked at, and zero for a query that has no key left."""
        edits = []
        for scores in self.sites:
            pattern = scores.replace("hook_attn_scores", "hook_pattern")
            self.left[pattern] = AttentionLeft()
            edits.append(Edit(scores, lambda x, at=pattern: self._block(x, at)))
            edits.append(Edit(pattern, lambda x, at=pattern: self._checked(x, at)))
        return edits

    def _block(self, scores: Tensor, at: str) -> Tensor:
        blocked = scores.masked_fill(self.cut.blocked(scores), -torch.inf)
        # What a model masks itself has its dtype's smallest number, or minus infinity.
        none_left = (blocked <= torch.finfo(scores.dtype).min / 2).all(-1, keepdim=True)
        self.dead[at] = none_left & self.cut.blocked(scores).any(-1, keepdim=True)
        return torch.where(self.dead[at], scores, blocked)

    def _checked(self, pattern: Tensor, at: str) -> Tensor:
        self.left[at].add(pattern, self.cut.blocked(pattern) & ~self.dead[at])
        return pattern.masked_fill(self.dead[at], 0.0)


def knock_out(
    model: Model,
    inputs: Mapping[str, Any],
    metric: Metric,
    cuts: Sequence[Cut],
    *,
    tower: str = "language",
    folder: str | Path | None = None,
) -> Knockout:
    """Runs the inputs once for each cut, without the attention that it blocks.

    Scores are set to minus infinity before the softmax, and in every run the pattern after it is looked at:
    it must be exactly zero there. A query that has no key left attends to nothing: its pattern is zero.

    Args:
        model: What is run.
        inputs: Raw or prepared.
        metric: Maps the model's output to one number for each row.
        cuts: What is blocked, one at a time. Where a padded or masked key is blocked too, nothing changes.
        tower: Whose attention.
        folder: Where runs are written down as they are done, so that a call that was killed goes on.

    Source: Geva et al. 2023, arXiv 2304.14767, section 4; Neo et al. 2024, arXiv 2410.07149 (in VLMs).
    Raises: MissingSiteError for a layer without scores; InputError for a cut that blocks nothing or does not
        fit the rows, before anything runs; AttentionUnreachableError if attention is left.
    """
    sites = [_sites(model, tower, cut) for cut in cuts]
    for cut in cuts:
        _check(cut)
    ready = prepared_once(model, inputs)
    read = sorted(
        {scores.replace("hook_attn_scores", "hook_pattern") for of_cut in sites for scores in of_cut}
    )
    masses: dict[str, list[Tensor]] = {}

    def looked_at(pattern: Tensor, at: str) -> Tensor:
        masses[at] = [_mass(pattern, c) for c, own in zip(cuts, sites, strict=True) if _has(own, at)]
        return pattern.new_zeros(0)

    base = model.run(ready, read=[Read(at, reduce=lambda x, at=at: looked_at(x, at)) for at in read])
    first = metric(base.output).detach().float()
    mass = [torch.stack([masses[at].pop(0) for at in read if _has(own, at)]).mean(0) for own in sites]
    bar = tqdm(total=len(cuts), desc="knockout", unit="run", disable=None, leave=False)

    def one_run(sofar: State, number: int) -> State:
        blocker = _Blocker(cuts[number], sites[number])
        output = model.run(ready, edit=blocker.edits()).output
        verify(blocker.left)
        values = sofar["values"].clone()
        values[number] = metric(output).detach().float()
        bar.update()
        return {"values": values}

    facts = [(c.name, list(own), c.heads) for c, own in zip(cuts, sites, strict=True)]
    masks = [(c.queries, c.keys) for c in cuts]
    made_of: dict[str, Any] = {
        "models": {"model": model},
        "data": [ready, masks],
        "cuts": facts,
        "metric": metric,
    }
    with bar, kept(folder, job="knock_out", **made_of) as work:
        start = {"values": first.new_zeros(len(cuts), len(first))}
        values = run_steps(len(cuts), one_run, start, work.inside("runs.safetensors"))["values"]
    return Knockout(
        values=values,
        base=first,
        mass=torch.stack(mass).to(first),
        names=tuple(cut.name for cut in cuts),
        layers=tuple(tuple(int(site.split(".")[2]) for site in own) for own in sites),
        tower=tower,
    )


def _has(sites: Sequence[str], pattern: str) -> bool:
    return pattern.replace("hook_pattern", "hook_attn_scores") in sites


def _mass(pattern: Float[Tensor, "row head query key"], cut: Cut) -> Float[Tensor, " row"]:
    """The attention that a query of the cut gives to what is blocked, the mean over queries and heads."""
    blocked = cut.blocked(pattern)
    given = (pattern.float() * blocked).sum((1, 2, 3))
    return given / blocked.any(-1).sum((1, 2)).clamp(min=1)


def _sites(model: Model, tower: str, cut: Cut) -> list[str]:
    """The scores of the cut's layers. Raises: MissingSiteError for one that there is not."""
    stack = (
        "decoder"
        if model.check_tower(tower).n_layers("decoder") and cut.attention == "cross_attn"
        else "blocks"
    )
    name = f"{tower}.{stack}.{{}}.{cut.attention}.hook_attn_scores"
    if cut.layers is None:
        every = range(max(1, model.check_tower(tower).n_layers(stack)))
        present = {site.name for site in model.sites(name.format("*")) if site.reason is None}
        sites = [name.format(i) for i in every if name.format(i) in present] or [name.format(0)]
    else:
        sites = [name.format(i) for i in cut.layers]
    check_sites(model, [*sites, *(site.replace("hook_attn_scores", "hook_pattern") for site in sites)])
    return sites


def _check(cut: Cut) -> None:
    masks = {"queries": cut.queries} | ({} if cut.keys is None else {"keys": cut.keys})
    n_rows = {len(mask) for mask in masks.values()}
    empty = [
        f"{what} of row {row}"
        for what, mask in masks.items()
        for row, any_there in enumerate(mask.any(-1).tolist())
        if not any_there
    ]
    if len(n_rows) > 1 or empty:
        raise InputError(
            f"The cut {cut.name!r} blocks nothing: "
            + (f"there are no {empty[0]}." if empty else f"its masks have {n_rows} rows.")
            + " Give masks [row, pos] with a position in each row."
        )
