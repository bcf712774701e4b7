"""The gradient of a metric between two runs, averaged along the straight path from one to the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mm_adapters import Call, Edit, InputError, Model, Read

Metric = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Ends:
    """The values of one site at both ends of a path, and the calls they are of (none outside loops).

    Of a sampling loop they are [call, row, ...], else [row, ...]. Where `only` is False, [row, pos], the site
    is left as the run has it.
    """

    start: Tensor
    end: Tensor
    calls: tuple[Call, ...] = ()
    only: Tensor | None = None

    def at(self, share: float) -> Callable[..., Tensor]:
        """An edit that puts the site this share of the way from its start to its end."""
        mixed = self.start + share * (self.end - self.start)
        number = {call: i for i, call in enumerate(self.calls)}

        def put(value: Tensor, call: Call) -> Tensor:
            new = (mixed[number[call]] if number else mixed).to(value)
            if self.only is None:
                return new
            only = self.only.to(new.device)
            return torch.where(only.reshape(*only.shape, *[1] * (new.ndim - only.ndim)), new, value)

        return put


@dataclass(frozen=True)
class PathGradients:
    """The mean gradient over the path's points at each site, and the metric of each row at each point."""

    grads: Mapping[str, Tensor]
    metric: Float[Tensor, "point row"]


def midpoints(n: int) -> tuple[float, ...]:
    """The middles of n equal pieces of 0..1: the midpoint rule, of second order where end sums are of first.

    Raises: InputError if there is no piece.
    """
    if n < 1:
        raise InputError(f"A path has at least one point, not {n}.")
    return tuple((k + 0.5) / n for k in range(n))


def path_gradients(
    model: Model,
    inputs: Mapping[str, Any],
    read: Sequence[str],
    path: Mapping[str, Ends],
    metric: Metric,
    *,
    shares: Sequence[float],
    rows: Literal["all", "cond"] = "all",
    stopped: Sequence[str] = (),
) -> PathGradients:
    """One run with a gradient at each share of the path; memory does not grow with their number.

    The sum over a path's own sites of (end - start) times the mean gradient tends to the metric at the end
    less that at the start (completeness), whatever the model.

    Args:
        inputs: The run's own arguments; what is not on the path is computed from them.
        read: The sites whose gradients are wanted.
        path: The sites that are moved, together, each with its ends.
        metric: Maps the output to one number for each row, by torch operations.
        shares: How far along the path each point lies; empty for the gradient of the run as it is.
        rows: The rows that are moved and read, as in `mm_adapters.Read`.
        stopped: Sites that keep their values and pass no gradient back (GradDrop).

    Source: Sundararajan et al. 2017, arXiv 1703.01365; Hanna et al. 2024, arXiv 2403.17806 (of circuits).
    Raises: InputError for a metric without a gradient.
    """
    sums: dict[str, Tensor] = {}
    values: list[Tensor] = []
    reads = [Read(site, rows=rows) for site in read]
    for share in shares or (None,):
        moved = {} if share is None else path
        edits = [Edit(site, ends.at(share or 0.0), rows=rows) for site, ends in moved.items()]
        edits += [Edit(site, Tensor.detach) for site in stopped]
        run = model.run(inputs, read=reads, edit=edits, grad_of=differentiable_sum(metric, values))
        for site, grad in run.grads.items():
            sums[site] = sums[site] + grad.float() if site in sums else grad.float()
    n = len(shares) or 1
    return PathGradients({site: total / n for site, total in sums.items()}, torch.stack(values))


def differentiable_sum(metric: Metric, values: list[Tensor]) -> Callable[[Any], Tensor]:
    """The metric's sum over rows, for `grad_of`; each row's value is put on the list."""

    def scalar(output: Any) -> Tensor:
        value = metric(output)
        if not isinstance(value, Tensor) or not value.requires_grad:
            raise InputError(
                f"The metric {getattr(metric, '__name__', metric)!r} gave a value without a gradient, so it "
                "has no attribution. Use one made of torch operations on the output; a rule on pixels, or an "
                "argmax, has none: patching takes that."
            )
        values.append(value.detach().float().reshape(-1).cpu())
        return value.sum()

    return scalar
