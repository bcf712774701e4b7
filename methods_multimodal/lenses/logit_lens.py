"""What a language tower would answer if it stopped after each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from methods_multimodal.core.record import Record
from mm_adapters import HookedModel, Lens, Read


@dataclass(frozen=True)
class LogitLens(Record):
    """Logits read off the residual stream: before the first block, then after each one."""

    logits: Float[Tensor, "row layer token"]
    final_norm: bool

    @property
    def probabilities(self) -> Float[Tensor, "row layer token"]:
        """The softmax of the logits."""
        return self.logits.softmax(-1)

    def top(self, k: int = 5, row: int = 0) -> tuple[Float[Tensor, "layer k"], Int[Tensor, "layer k"]]:
        """The likeliest tokens of each layer: probabilities and ids."""
        values, ids = self.probabilities[row].topk(k, -1)
        return values, ids


def logit_lens(
    model: HookedModel,
    inputs: Mapping[str, Any],
    *,
    final_norm: bool,
    position: int = -1,
    tower: str = "language",
    lens: Lens | None = None,
) -> LogitLens:
    """Unembeds the residual stream at one position after each layer.

    With `final_norm` each state goes through the final norm first, as the last one does in the model
    (the last layer's logits are then the model's own); without it the raw state meets the unembedding.

    Source: nostalgebraist 2020, interpreting GPT: the logit lens.
    """
    view = model.tower(tower)
    last = view.cfg.n_layers - 1
    sites = [f"{tower}.blocks.{i}.hook_resid_pre" for i in range(last + 1)]
    sites.append(f"{tower}.blocks.{last}.hook_resid_post")
    run = (lens or model).run(inputs, read=[Read(s, reduce=lambda x: x[:, position]) for s in sites])
    states = torch.stack([run[s] for s in sites], 1)
    norm: Any = view.ln_final
    with torch.no_grad():
        normed = norm(states) if final_norm else states
        logits = normed.float() @ view.W_U.float() + view.b_U.float()
    return LogitLens(logits=logits, final_norm=final_norm)
