"""Many non-negative sparse regressions on one dictionary at once, solved to a certified gap."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

_ADD = 8  # Concepts that join each row's working set in a round.
_ROUNDS = 400


def solve(
    targets: Float[Tensor, "row width"],
    dictionary: Float[Tensor, "concept width"],
    penalty: float,
    tolerance: float = 1e-7,
) -> Float[Tensor, "row concept"]:
    """w >= 0 that makes |w D - z|^2 + penalty * sum(w) least, for every row z.

    Each row works on a small set of concepts. In a round, the set's own problem is solved exactly, and
    the concepts whose gradient asks most for weight join. A row is finished when none asks for more
    than `tolerance` beyond the penalty: that is the optimality condition of the whole problem.
    """
    half = penalty / 2
    weights = targets.new_zeros(len(targets), len(dictionary))
    open_rows = torch.arange(len(targets), device=targets.device)
    sets = torch.empty(len(targets), 0, dtype=torch.long, device=targets.device)
    values = targets.new_zeros(len(targets), 0)
    for _ in range(_ROUNDS):
        residual = targets[open_rows] - _recombined(values, sets, dictionary)
        asks = residual @ dictionary.T - half
        taken = asks.scatter(1, sets, -torch.inf) if sets.shape[1] else asks
        best, joining = taken.topk(min(_ADD, len(dictionary) - sets.shape[1]), dim=1)
        still = best[:, 0] > tolerance
        done = ~still
        if done.any():
            weights[open_rows[done]] = weights[open_rows[done]].scatter(1, sets[done], values[done])
        if not still.any():
            return weights
        open_rows, joining, best = open_rows[still], joining[still], best[still]
        sets, values = _trimmed(sets[still], values[still])
        sets = torch.cat([sets, joining], 1)
        values = torch.cat([values, torch.zeros_like(best)], 1)
        values = _small(targets[open_rows], dictionary[sets], half, values, tolerance)
    raise RuntimeError(f"{len(open_rows)} of {len(targets)} rows did not settle; raise the penalty or the tolerance.")


def _recombined(
    values: Float[Tensor, "row set"], sets: Int[Tensor, "row set"], dictionary: Float[Tensor, "concept width"]
) -> Float[Tensor, "row width"]:
    if not sets.shape[1]:
        return dictionary.new_zeros(len(values), dictionary.shape[1])
    return torch.bmm(values.unsqueeze(1), dictionary[sets]).squeeze(1)


def _trimmed(
    sets: Int[Tensor, "row set"], values: Float[Tensor, "row set"]
) -> tuple[Int[Tensor, "row kept"], Float[Tensor, "row kept"]]:
    """The concepts with weight first, and as few columns as hold them all."""
    order = values.argsort(dim=1, descending=True)
    most = int((values > 0).sum(1).max()) if values.numel() else 0
    order = order[:, :most]
    return sets.gather(1, order), values.gather(1, order)


def _small(
    targets: Float[Tensor, "row width"],
    atoms: Float[Tensor, "row set width"],
    half: float,
    values: Float[Tensor, "row set"],
    tolerance: float,
) -> Float[Tensor, "row set"]:
    """Each row's problem on its own set, exactly: an active-set method, all rows in step.

    Source: Lawson & Hanson 1974, Solving Least Squares Problems, chapter 23 (NNLS).
    """
    wide = atoms.double()
    gram = wide @ wide.mT
    wanted = (wide @ targets.double().unsqueeze(-1)).squeeze(-1) - half
    w = values.double()
    active = w > 0
    eye = torch.eye(gram.shape[1]).to(gram)
    rows = torch.arange(len(w), device=w.device)
    fresh = torch.ones(len(w), dtype=torch.bool, device=w.device)  # Rows that may take another concept.
    for _ in range(12 * gram.shape[1] + 12):
        slope = (wanted - (gram @ w.unsqueeze(-1)).squeeze(-1)).masked_fill(active, -torch.inf)
        best, which = slope.max(1)
        joins = fresh & (best > tolerance)
        if not joins.any() and bool(fresh.all()):
            break
        active[rows[joins], which[joins]] = True
        both = active.unsqueeze(1) & active.unsqueeze(2)
        system = torch.where(both, gram, eye)
        aim = torch.linalg.solve(system, torch.where(active, wanted, 0.0))
        below = active & (aim <= 0)
        # Walk towards the aim until the first weight reaches zero; that concept leaves.
        ratio = torch.where(below, w / (w - aim).clamp_min(1e-300), torch.inf)
        step = ratio.min(1).values.clamp_max(1.0)
        w = torch.where(active, w + step.unsqueeze(1) * (aim - w), 0.0)
        leaves = below & (ratio <= step.unsqueeze(1))
        active &= ~leaves
        w = w.masked_fill(~active, 0.0).clamp_min(0.0)
        fresh = ~below.any(1)
    return w.to(values)
