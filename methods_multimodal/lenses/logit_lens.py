"""What a language tower would answer if it stopped after each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from methods_multimodal.core.model import check_sites
from methods_multimodal.core.positions import in_rows
from methods_multimodal.core.record import Record
from mm_adapters import Model, Read


@dataclass(frozen=True)
class LogitLens(Record):
    """Logits read off the residual stream: before the first block, then after each one.

    `position` is where they were read, as it was asked for: -1 is each row's last attended position.
    """

    logits: Float[Tensor, "row layer token"]
    final_norm: bool
    position: int = -1

    @property
    def probabilities(self) -> Float[Tensor, "row layer token"]:
        """The softmax of the logits."""
        return self.logits.softmax(-1)

    def top(self, k: int = 5, row: int = 0) -> tuple[Float[Tensor, "layer k"], Int[Tensor, "layer k"]]:
        """The likeliest tokens of each layer: probabilities and ids."""
        values, ids = self.probabilities[row].topk(k, -1)
        return values, ids


def logit_lens(
    model: Model,
    inputs: Mapping[str, Any],
    *,
    final_norm: bool,
    position: int = -1,
    tower: str = "language",
) -> LogitLens:
    """Unembeds the residual stream at one position after each layer.

    Position -1 is the last position of each row that its attention mask has, -2 the one before it.
    From 0 on it is the position itself, counted over the whole sequence with its padding.

    With `final_norm` each state goes through the final norm first, as the last one does in the model
    (the last layer's logits are then the model's own); without it the raw state meets the unembedding.

    Source: nostalgebraist 2020, interpreting GPT: the logit lens.
    Raises: MissingSiteError if the tower has no stream of blocks, no final norm or no unembedding;
    InputError if a row has no such position.
    """
    view = model.check_tower(tower)
    view.check_one_stream()
    n_layers = max(1, view.n_layers())  # A tower without blocks lacks the first one's sites.
    sites = [f"{tower}.blocks.{i}.hook_resid_pre" for i in range(n_layers)]
    sites.append(f"{tower}.blocks.{n_layers - 1}.hook_resid_post")
    check_sites(model, [*sites, *([f"{tower}.ln_final.hook_scale"] if final_norm else [])])
    matrix, bias = view.unembedding.float(), view.projection_bias
    at = in_rows(model, inputs, position, tower)
    run = model.run(inputs, read=[Read(s, reduce=at.of) for s in sites])
    states = torch.stack([run[s] for s in sites], 1)
    norm = view.final_norm
    with torch.no_grad():
        normed = norm.module(states) if final_norm and norm is not None else states
        logits = normed.float() @ matrix
        logits = logits + (torch.zeros_like(logits[0, 0]) if bias is None else bias.float())
    return LogitLens(logits=logits, final_norm=final_norm, position=position)
