"""Which neurons raise an answer's log probability by what they write at the last position."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from methods_multimodal.core.model import check_sites, prepared_once
from methods_multimodal.core.positions import in_rows
from methods_multimodal.core.record import Record
from methods_multimodal.lenses.log_prob import log_prob_of
from methods_multimodal.neurons.places import Neuron, mlp_sites, output_weights
from mm_adapters import InputError, Model, Read, TowerView


@dataclass(frozen=True)
class ProbabilityChange(Record):
    """How much the log probability of each row's token rises when a neuron's output joins the state."""

    increase: Float[Tensor, "row layer neuron"]
    layers: tuple[int, ...]
    tokens: tuple[int, ...]
    tower: str

    def top(self, n: int) -> tuple[Neuron, ...]:
        """The neurons with the largest mean increase, as (layer, neuron)."""
        mean = self.increase.mean(0)
        order = mean.flatten().argsort(descending=True)[:n].tolist()
        return tuple((self.layers[i // mean.shape[1]], i % mean.shape[1]) for i in order)


def probability_change(
    model: Model,
    inputs: Mapping[str, Any],
    tokens: Sequence[int],
    *,
    tower: str = "language",
    layers: Sequence[int] | None = None,
) -> ProbabilityChange:
    """log p(token | state + the neuron's output) less log p(token | state), at each row's last position.

    The state is that between a layer's attention and its MLP, read through the final norm and the
    unembedding. One forward; it needs no gradient.

    Source: Yu and Ananiadou 2024, arXiv 2312.12141, section 3 (log probability increase of FFN neurons).
    Raises: MissingSiteError if the tower has no unembedding, no one stream or no neurons; InputError for
        tokens that are not one for each row.
    """
    view = model.check_tower(tower)
    n_tokens = view.unembedding.shape[1]
    view.check_one_stream()
    chosen = mlp_sites(model, tower, layers)
    middles = [f"{tower}.blocks.{i}.hook_resid_mid" for i in chosen]
    check_sites(model, [*chosen.values(), *middles, f"{tower}.ln_final.hook_scale"])
    scales = {i: f"{tower}.blocks.{i}.ln2_post.hook_scale" for i in chosen if _post_norm(view, i)}
    check_sites(model, scales.values())
    ids = torch.as_tensor([int(i) for i in tokens])
    ready = prepared_once(model, inputs)
    at = in_rows(model, ready, -1, tower)
    n_rows = len(at.index) if isinstance(at.index, Tensor) else len(ids)
    if len(ids) != n_rows or not len(ids) or int(ids.min()) < 0 or int(ids.max()) >= n_tokens:
        raise InputError(
            f"tokens={list(tokens)[:5]}: one for each of {n_rows} rows, from 0 to {n_tokens - 1}."
        )
    run = model.run(
        ready, read=[Read(s, reduce=at.of) for s in (*chosen.values(), *middles, *scales.values())]
    )
    increases = []
    for (layer, site), middle in zip(chosen.items(), middles, strict=True):
        state, active, writes = run[middle].float(), run[site].float(), output_weights(view, layer)
        if layer in scales:  # What the MLP gives is normalised before it joins the stream.
            writes = writes * _post_norm(view, layer)["w"]().detach().float()
            active = active / run[scales[layer]].float()
        before = log_prob_of(view, state, ids)
        # One row after the other: [neuron, d_model] states at once.
        after = [
            log_prob_of(view, rearrange(s, "m -> 1 1 m") + a[None, :, None] * writes, ids[[row]])[0]
            for row, (s, a) in enumerate(zip(state, active, strict=True))
        ]
        increases.append(torch.stack(after) - before[:, None])
    return ProbabilityChange(torch.stack(increases, 1), tuple(chosen), tuple(ids.tolist()), tower)


def _post_norm(view: TowerView, layer: int) -> dict[str, Callable[[], Tensor]]:
    """The weights of the norm of the MLP's output before it joins the stream; none if it has none."""
    return view.weights(layer).names("ln2_post")
