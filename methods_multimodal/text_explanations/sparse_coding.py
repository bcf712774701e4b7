"""Many non-negative sparse regressions on one dictionary at once, solved to a certified gap."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

_ADD = 8  # Concepts that join each row's working set in a round.
_ROUNDS = 400
_RIDGE = 1e-12


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

    Raises: RuntimeError if a row does not settle.
    """
    half, width = penalty / 2, len(dictionary)
    finished: list[tuple[Tensor, Tensor, Tensor]] = []
    open_rows = torch.arange(len(targets), device=targets.device)
    sets = torch.empty(len(targets), 0, dtype=torch.long, device=targets.device)
    values, residual = targets.new_zeros(sets.shape), targets
    table = targets.new_empty(len(targets), width)  # One for all rounds: it is the largest thing here.
    for _ in range(_ROUNDS):
        asks = torch.mm(residual, dictionary.T, out=table[: len(residual)])
        asks.scatter_(1, sets, -torch.inf)
        best, joining = asks.topk(min(_ADD, width - sets.shape[1]), dim=1)
        still = (
            best[:, 0] > half + tolerance if best.shape[1] else torch.zeros_like(open_rows, dtype=torch.bool)
        )
        finished.append((open_rows[~still], sets[~still], values[~still]))
        open_rows = open_rows[still]
        if not len(open_rows):
            return _table(finished, targets, width)
        sets, values = _trimmed(sets[still], values[still])
        sets = torch.cat([sets, joining[still]], 1)
        values = torch.cat([values, values.new_zeros(len(sets), joining.shape[1])], 1)
        atoms = dictionary[sets]
        values = _small(targets[open_rows], atoms, half, values, tolerance)
        residual = targets[open_rows] - torch.bmm(values.unsqueeze(1), atoms).squeeze(1)
    raise RuntimeError(f"{len(open_rows)} of {len(targets)} rows did not settle; raise the penalty.")


def _table(
    finished: list[tuple[Tensor, Tensor, Tensor]], targets: Tensor, width: int
) -> Float[Tensor, "row concept"]:
    weights = targets.new_zeros(len(targets), width)
    for rows, sets, values in finished:
        weights[rows.unsqueeze(1), sets] = values
    return weights


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
    gram = torch.bmm(atoms, atoms.mT).double()
    linear = torch.bmm(atoms, targets.unsqueeze(-1)).squeeze(-1).double() - half
    w = values.double()
    active = w > 0
    # Two concepts may be one: the least bit of ridge keeps their system solvable.
    ridge = _RIDGE * torch.eye(gram.shape[1]).to(gram)
    eye = torch.eye(gram.shape[1]).to(gram)
    settled = torch.ones(len(w), dtype=torch.bool, device=w.device)
    for _ in range(12 * gram.shape[1] + 12):
        slope = (linear - (gram @ w.unsqueeze(-1)).squeeze(-1)).masked_fill(active, -torch.inf)
        asking = (slope > tolerance) & settled.unsqueeze(1)
        if not asking.any() and bool(settled.all()):
            break
        active = active | asking  # All that ask join: of those that do, one at least is given weight.
        both = active.unsqueeze(1) & active.unsqueeze(2)
        factor = torch.linalg.cholesky(torch.where(both, gram, eye) + ridge)
        aim = torch.cholesky_solve(torch.where(active, linear, 0.0).unsqueeze(-1), factor).squeeze(-1)
        below = active & (aim <= 0)
        # Walk towards the aim until the first weight reaches zero; that concept leaves.
        ratio = torch.where(below, w / (w - aim).clamp_min(1e-300), torch.inf)
        step = ratio.min(1).values.clamp_max(1.0)
        w = torch.where(active, w + step.unsqueeze(1) * (aim - w), 0.0)
        active = active & ~(below & (ratio <= step.unsqueeze(1)))
        w = w.masked_fill(~active, 0.0).clamp_min(0.0)
        settled = ~below.any(1)
    return w.to(values)
