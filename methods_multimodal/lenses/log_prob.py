"""The log probability of tokens that states of the residual stream would have, read as the last one is."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mm_adapters import TowerView

# Rows of logits that are made at once.
_CHUNK = 4096


def log_prob_of(
    view: TowerView, states: Float[Tensor, "*part d_model"], ids: Int[Tensor, " row"]
) -> Float[Tensor, "*part"]:
    """The log probability of each row's token, read off states by the final norm and the unembedding."""
    norm, matrix, bias = view.final_norm, view.unembedding.float(), view.projection_bias
    flat = states.flatten(0, -2)
    repeats = flat.shape[0] // len(ids)
    targets = ids.to(flat.device).repeat_interleave(repeats)
    found = []
    with torch.no_grad():
        for rows, of in zip(flat.split(_CHUNK), targets.split(_CHUNK), strict=True):
            normed = rows if norm is None else norm.module(rows.to(matrix.device, view.unembedding.dtype))
            logits = normed.float() @ matrix
            logits = logits if bias is None else logits + bias.float()
            found.append(logits.log_softmax(-1).gather(1, of[:, None])[:, 0])
    return torch.cat(found).reshape(states.shape[:-1])
