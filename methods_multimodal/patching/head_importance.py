"""Which heads, reading which positions, raise the answer's log probability."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum, repeat
from jaxtyping import Float, Int
from torch import Tensor

from methods_multimodal.core.model import check_sites, prepared_once
from methods_multimodal.core.positions import in_rows
from methods_multimodal.core.record import Record
from methods_multimodal.lenses.log_prob import log_prob_of
from methods_multimodal.lenses.residual_parts import ResidualWrites, needed_sites, reads, writes
from mm_adapters import InputError, Model, Read, TowerView


@dataclass(frozen=True)
class HeadImportance(Record):
    """How much the log probability of each row's token rises when a head's output joins the state."""

    increase: Float[Tensor, "row layer head"]
    tokens: tuple[int, ...]
    tower: str

    def top(self, n: int = 5) -> tuple[tuple[int, int], ...]:
        """The heads whose mean increase over rows is largest, as (layer, head)."""
        mean = self.increase.mean(0)
        order = mean.flatten().argsort(descending=True)[:n].tolist()
        return tuple((i // mean.shape[1], i % mean.shape[1]) for i in order)


@dataclass(frozen=True)
class PositionImportance(Record):
    """The same of what single heads read from single positions: `heads` are (layer, head)."""

    increase: Float[Tensor, "row head pos"]
    heads: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    tower: str


def head_importance(
    model: Model, inputs: Mapping[str, Any], tokens: Sequence[int], *, tower: str = "language"
) -> HeadImportance:
    """The log probability of each row's token read off the state with a head's output, less without it.

    The state is that before the layer, at the row's last attended position, and is read through the final
    norm and the unembedding. One forward; nothing is ablated.

    Source: Yu and Ananiadou 2024, arXiv 2411.10950, section 3 (log probability increase).
    Raises: MissingSiteError if the tower has no unembedding or no one stream; InputError for tokens that are
        not one for each row.
    """
    view = _checked(model, tower)
    ids = _tokens(tokens, view)
    states, parts, _ = _run(model, inputs, view, ids, ())
    outputs = einsum(parts.z, parts.w_o, "row layer head d, layer head d m -> row layer head m")
    increase = _increase(view, states[:, :, None], outputs, ids)
    return HeadImportance(increase, tuple(ids.tolist()), tower)


def position_importance(
    model: Model,
    inputs: Mapping[str, Any],
    tokens: Sequence[int],
    heads: Sequence[tuple[int, int]],
    *,
    tower: str = "language",
) -> PositionImportance:
    """The same of what some heads read from each position: their attention times that value, projected.

    Over image positions it is a map: which patches a head takes the answer from.

    Source: Yu and Ananiadou 2024, arXiv 2411.10950, section 4.
    Raises: as `head_importance`; MissingSiteError for a layer that there is not, InputError for such a head.
    """
    view = _checked(model, tower)
    ids = _tokens(tokens, view)
    if not heads:
        raise InputError("heads: there are none. Give pairs (layer, head), such as `HeadImportance.top()`.")
    layers = sorted({int(layer) for layer, _ in heads})
    sites = [f"{tower}.blocks.{i}.attn.{part}" for i in layers for part in ("hook_pattern", "hook_v")]
    check_sites(model, sites)
    n_heads = view.weights(layers[0]).names("attn")["W_O"]().shape[0]
    for layer, head in heads:
        if not 0 <= head < n_heads:
            raise InputError(f"heads: layer {layer} has no head {head}; it has 0 to {n_heads - 1}.")
    states, parts, values = _run(model, inputs, view, ids, sites)
    increases = []
    for layer, head in heads:
        pattern, v = (values[f"{tower}.blocks.{layer}.attn.{part}"] for part in ("hook_pattern", "hook_v"))
        v = repeat(v.float(), "row pos kv d -> row pos (kv g) d", g=n_heads // v.shape[2])[:, :, head]
        weight = pattern.float()[:, head] * parts.attn_scale[:, layer, None]
        outputs = einsum(weight, v, parts.w_o[layer, head], "row pos, row pos d, d m -> row pos m")
        increases.append(_increase(view, states[:, layer, None], outputs, ids))
    return PositionImportance(
        increase=torch.stack(increases, 1),
        heads=tuple((int(layer), int(head)) for layer, head in heads),
        tokens=tuple(ids.tolist()),
        tower=tower,
    )


def _checked(model: Model, tower: str) -> TowerView:
    """The tower. Raises: MissingSiteError if its heads do not add up to what its words are read from."""
    view = model.check_tower(tower)
    _ = view.unembedding
    check_sites(model, needed_sites(view))
    return view


def _tokens(tokens: Sequence[int], view: TowerView) -> Int[Tensor, " row"]:
    ids = torch.as_tensor([int(i) for i in tokens])
    n_tokens = view.unembedding.shape[1]
    if not len(ids) or int(ids.min()) < 0 or int(ids.max()) >= n_tokens:
        raise InputError(f"tokens={list(tokens)[:5]}: one for each row, from 0 to {n_tokens - 1}.")
    return ids


def _run(
    model: Model, inputs: Mapping[str, Any], view: TowerView, ids: Tensor, whole: Sequence[str]
) -> tuple[Float[Tensor, "row layer d_model"], ResidualWrites, Mapping[str, Tensor]]:
    """The state before each layer, what was written, and the sites `whole` (of a pattern the last query)."""
    ready = prepared_once(model, inputs)
    at = in_rows(model, ready, -1, view.name)
    n_rows = len(at.index) if isinstance(at.index, Tensor) else len(ids)
    if n_rows != len(ids):
        raise InputError(f"There are {len(ids)} tokens for {n_rows} rows; give one for each.")
    before = [f"{view.name}.blocks.{i}.hook_resid_pre" for i in range(view.n_layers())]
    asked = {read.site: read for read in reads(view, at.of)}
    asked |= {site: Read(site, reduce=at.of) for site in before}
    for site in whole:
        last = (lambda x: at.of(x.transpose(1, 2))) if site.endswith("pattern") else None
        asked[site] = Read(site, reduce=last)
    run = model.run(ready, read=list(asked.values()))
    states = torch.stack([run[site].float() for site in before], 1)
    return states, writes(run.values, view), {site: run[site] for site in whole}


def _increase(
    view: TowerView,
    states: Float[Tensor, "*part d_model"],
    outputs: Float[Tensor, "*outputs d_model"],
    ids: Int[Tensor, " row"],
) -> Float[Tensor, "*outputs"]:
    """log p(token | state + output) - log p(token | state), by the final norm and the unembedding."""
    with_it = log_prob_of(view, states + outputs, ids)
    return with_it - log_prob_of(view, states, ids)
