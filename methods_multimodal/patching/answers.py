"""How much a VLM's answer is one token rather than another: metrics of each row at its last position."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from methods_multimodal.core.model import check_sites
from methods_multimodal.core.positions import in_rows
from mm_adapters import InputError, Model


def answer_logits(
    model: Model,
    inputs: Mapping[str, Any],
    right: Sequence[int],
    wrong: Sequence[int],
    *,
    tower: str = "language",
) -> Callable[[Any], Float[Tensor, " row"]]:
    """A metric: the logit of each row's right token less its wrong one's, after its last attended position.

    It does not saturate, as a probability does.

    Raises: MissingSiteError if the tower writes no words; InputError if tokens are not one for each row.
    """
    view = model.check_tower(tower)
    n_tokens = view.unembedding.shape[1]
    check_sites(model, [f"{tower}.blocks.0.hook_resid_pre"])  # Not an encoder whose decoder answers.
    at = in_rows(model, inputs, -1, tower)
    ids = [_tokens(name, given, n_tokens) for name, given in (("right", right), ("wrong", wrong))]

    def metric(output: Any) -> Float[Tensor, " row"]:
        logits = at.of(view.vocabulary_logits(output)).float()
        _check_rows(len(logits), *ids)
        rows = torch.arange(len(logits), device=logits.device)
        first, second = (logits[rows, of.to(logits.device)] for of in ids)
        return first - second

    return metric


def answer_log_prob(
    model: Model, inputs: Mapping[str, Any], tokens: Sequence[int], *, tower: str = "language"
) -> Callable[[Any], Float[Tensor, " row"]]:
    """A metric: the log probability of each row's token after its last attended position.

    Raises: as `answer_logits`.
    """
    view = model.check_tower(tower)
    n_tokens = view.unembedding.shape[1]
    check_sites(model, [f"{tower}.blocks.0.hook_resid_pre"])
    at, ids = in_rows(model, inputs, -1, tower), _tokens("tokens", tokens, n_tokens)

    def metric(output: Any) -> Float[Tensor, " row"]:
        log_probs = at.of(view.vocabulary_logits(output)).float().log_softmax(-1)
        _check_rows(len(log_probs), ids)
        return log_probs[torch.arange(len(log_probs), device=log_probs.device), ids.to(log_probs.device)]

    return metric


def _tokens(name: str, given: Sequence[int], n_tokens: int) -> Tensor:
    ids = torch.as_tensor([int(i) for i in given])
    wrong = [i for i in ids.tolist() if not 0 <= i < n_tokens]
    if not len(ids) or wrong:
        raise InputError(f"{name}: {wrong[:3] or 'no'} tokens; there are the numbers 0 to {n_tokens - 1}.")
    return ids


def _check_rows(n_rows: int, *ids: Tensor) -> None:
    for of in ids:
        if len(of) != n_rows:
            raise InputError(f"There are {len(of)} tokens for {n_rows} rows; give one for each.")
