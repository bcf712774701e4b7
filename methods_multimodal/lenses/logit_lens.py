"""What a language tower would answer if it stopped after each layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from methods_multimodal.core.model import check_sites
from methods_multimodal.lenses._entries import (
    Entries,
    Positions,
    entries_of,
    layer_names,
    stream_sites,
    token_names,
)
from methods_multimodal.lenses.reading import LensReading
from mm_adapters import InputError, Model, Read, TowerView


def logit_lens(
    model: Model,
    inputs: Mapping[str, Any],
    *,
    final_norm: bool,
    position: Positions = -1,
    tokens: Sequence[int] | None = None,
    tower: str = "language",
) -> LensReading:
    """Unembeds the residual stream at chosen positions, before the first block and after each one.

    With `final_norm` each state goes through the final norm first, as the last one does in the model: the
    last layer's logits are then the model's own, bit for bit, where the model does no more than norm and
    unembed (`own_gap` says how far they are apart at most; a model that caps its logits is). Without it the
    raw state meets the unembedding.

    Args:
        model: One with a language tower.
        inputs: The model's own arguments.
        final_norm: Whether states go through the final norm.
        position: -1 is the last position of each row that its attention mask has, -2 the one before it;
            from 0 on it is the position itself, counted over the whole sequence with its padding. Or several,
            or a role of the layout: "image" for all image tokens, "word", "all".
        tokens: The token ids that are kept; the whole vocabulary without. Probabilities are of all in
            either case.
        tower: The language tower's name.

    Source: nostalgebraist 2020, interpreting GPT: the logit lens.
    Raises: MissingSiteError if the tower has no stream of blocks, no final norm or no unembedding, or no
    position has the role; InputError if a row has no such position, or the vocabulary no such token.
    """
    view = model.check_tower(tower)
    sites = checked_sites(model, view, final_norm=final_norm)
    kept = checked_tokens(view, tokens)
    entries = entries_of(model, inputs, position, tower)
    states, last, own = stream_at(model, inputs, view, sites, entries, final_norm=final_norm)
    with torch.no_grad():
        layers = [*map(unembedding_of(view, final_norm=final_norm), states), last]
    return reading(
        model,
        view,
        layers,
        entries,
        kept,
        lens_name="logit" if final_norm else "raw logit",
        own_gap=float((last - own).abs().max()) if final_norm else None,
    )


def stream_at(
    model: Model,
    inputs: Mapping[str, Any],
    view: TowerView,
    sites: Sequence[str],
    entries: Entries,
    *,
    final_norm: bool = True,
) -> tuple[list[Tensor], Float[Tensor, "entry token"], Float[Tensor, "entry token"]]:
    """From one run: the states before each block; the logits of the last; the model's own.

    The last state is unembedded as a whole, as the model does it, so that it is the same to the last bit.
    """
    run = model.run(inputs, read=[*(Read(s, reduce=entries.of) for s in sites[:-1]), sites[-1]])
    with torch.no_grad():
        last = entries.of(unembedding_of(view, final_norm=final_norm)(run[sites[-1]])).float()
    own = entries.of(view.vocabulary_logits(run.output)).detach().float()
    return [run[s].detach() for s in sites[:-1]], last, own


def reading(
    model: Model,
    view: TowerView,
    layers: Sequence[Float[Tensor, "entry token"]],
    entries: Entries,
    kept: Tensor | None,
    *,
    lens_name: str,
    own_gap: float | None,
) -> LensReading:
    """The record of the logits of each layer, of which only these tokens are kept."""
    layers = [logits.float() for logits in layers]
    kept = None if kept is None else kept.to(layers[-1].device)
    return LensReading(
        scores=torch.stack([x if kept is None else x[:, kept] for x in layers], 1),
        total=torch.stack([x.logsumexp(-1) for x in layers], 1),
        lens=lens_name,
        unit="logit",
        layers=layer_names(len(layers)),
        candidates=() if kept is None else token_names(model, kept.tolist(), view.name),
        own_gap=own_gap,
        **entries.about,
    )


def checked_sites(model: Model, view: TowerView, *, final_norm: bool = True) -> list[str]:
    """The stream's sites of a tower that unembeds it. Raises: MissingSiteError as `logit_lens`."""
    sites = stream_sites(model, view)
    check_sites(model, [f"{view.name}.ln_final.hook_scale"] if final_norm else [])
    _ = view.unembedding
    return sites


def checked_tokens(view: TowerView, tokens: Sequence[int] | None) -> Tensor | None:
    """The ids as a tensor. Raises: InputError for one that the vocabulary has not."""
    if tokens is None:
        return None
    n = view.unembedding.shape[1]
    for token in tokens:
        if not 0 <= int(token) < n:
            raise InputError(f"There is no token {int(token)}: the vocabulary has 0 to {n - 1}.")
    if not len(tokens):
        raise InputError("tokens=[]: give the ids to keep, or None for the whole vocabulary.")
    return torch.tensor([int(token) for token in tokens])


def unembedding_of(
    view: TowerView, *, final_norm: bool = True
) -> Callable[[Float[Tensor, "*at d_model"]], Float[Tensor, "*at token"]]:
    """What maps states to logits: the model's own norm and head, with their own arithmetic."""
    norm, head = view.final_norm, view.unembedding_module
    matrix, bias = view.unembedding, view.projection_bias

    def unembed(states: Tensor) -> Tensor:
        states = norm.module(states) if final_norm and norm is not None else states
        if head is not None:
            return head(states.to(matrix.dtype))
        logits = states.float() @ matrix.float()
        return logits if bias is None else logits + bias.float()

    return unembed
