"""How much of a model's behaviour its highest-ranked nodes keep, at every size: curves and their areas."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from methods_multimodal.circuits.nodes import Node, circuit_nodes, select_nodes
from methods_multimodal.circuits.pairs import Pairs, check_pairs
from methods_multimodal.circuits.patched import patched_metric, row_values, store
from methods_multimodal.core.kept import kept
from methods_multimodal.core.record import Record
from methods_multimodal.core.statistics import paired_interval
from mm_adapters import InputError, Model

# MIB's shares of the graph at which a circuit is measured.
SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_EVERY_SIZE = 64


@dataclass(frozen=True)
class FaithfulnessCurve(Record):
    """The metric when only the first so many parts of an order keep their clean values.

    The others have the corrupted run's (resampled from the twin), at all positions. `empty` is the metric
    with nothing kept, which is the corrupted run's, `clean` with everything kept.
    """

    metric: Float[Tensor, "size row"]
    clean: Float[Tensor, " row"]
    empty: Float[Tensor, " row"]
    sizes: tuple[int, ...]
    order: tuple[str, ...]

    @property
    def faithfulness(self) -> Float[Tensor, " size"]:
        """f: 0 with nothing kept, 1 as the whole model. A ratio of means, never a mean of ratios."""
        return torch.from_numpy(self._f()).float()

    def cpr(self) -> float:
        """MIB's area of f over the share of the graph; 0.999 is as the whole model, and more is possible."""
        return float(self._cpr(self._f()))

    def cmd(self) -> float:
        """MIB's area of |1 - f| over the share of the graph; 0 is as the whole model at every size."""
        return float(self._cmd(self._f()))

    def log_area(self) -> float:
        """The mean of f over the logarithm of the size, from 1 on: half of CPR is above half of the graph."""
        return float(self._log_area(self._f()))

    def size_at(self, level: float = 0.9) -> int:
        """The smallest size with f >= level; the size of the whole graph if none before has it."""
        reached = [n for n, f in zip(self.sizes, self.faithfulness.tolist(), strict=True) if f >= level]
        return min(reached, default=len(self.order))

    def interval(
        self, of: str, *, level: float = 0.95, draws: int = 2000, seed: int = 0
    ) -> Float[np.ndarray, "bound ..."]:
        """The bounds of "faithfulness" (at each size), "cpr", "cmd" or "log_area", rows drawn again.

        Raises: InputError for another name.
        """
        functions: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
            "faithfulness": lambda f: f,
            "cpr": self._cpr,
            "cmd": self._cmd,
            "log_area": self._log_area,
        }
        if of not in functions:
            raise InputError(f"There is no interval of {of!r}; there is {', '.join(functions)}.")

        def statistic(*samples: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
            return functions[of](_ratio(*samples, axis=axis))

        return paired_interval(statistic, *self._samples(), level=level, n_resamples=draws, rng=seed)

    def _f(self) -> NDArray[np.float64]:
        metric, clean, empty = self._samples()
        return _ratio(metric, clean, empty)

    def _samples(self) -> tuple[NDArray[np.float64], ...]:
        return tuple(x.double().numpy() for x in (self.metric, self.clean, self.empty))

    def _cpr(self, f: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(np.trapezoid(self._at_shares(f), SHARES, axis=0))

    def _cmd(self, f: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(np.trapezoid(np.abs(1 - self._at_shares(f)), SHARES, axis=0))

    def _log_area(self, f: NDArray[np.float64]) -> NDArray[np.float64]:
        sizes = [n for n in self.sizes if n >= 1]
        x = np.log(sizes) / math.log(max(2, len(self.order)))
        return np.asarray(np.trapezoid(f[[self.sizes.index(n) for n in sizes]], x, axis=0))

    def _at_shares(self, f: NDArray[np.float64]) -> NDArray[np.float64]:
        return f[[self.sizes.index(int(share * len(self.order))) for share in SHARES]]


def faithfulness_curve(
    model: Model,
    pairs: Sequence[Pairs],
    order: Sequence[str],
    nodes: Sequence[Node] | None = None,
    *,
    sizes: Sequence[int] | None = None,
    folder: str | Path | None = None,
) -> FaithfulnessCurve:
    """Keeps the first nodes of an order, more and more of them, and patches all others.

    Use other pairs than those that made the order.

    Args:
        pairs: Batches of rows.
        order: The names of all nodes, best first: `NodeScores.order()`, signed for CPR and by size for CMD.
        nodes: The graph (None: `circuit_nodes`).
        sizes: How many are kept (None: every size of a graph of up to 64 nodes, else powers of two); those
            that CPR and CMD need are always there.
        folder: Where batches are written down as they are done; a call that was killed goes on there.

    Source: Mueller et al. 2025, arXiv 2504.13151 (MIB), section 4: CPR and CMD.
    Raises: InputError unless the order has every node once, or if the metric does not tell the inputs apart.
    """
    graph = circuit_nodes(model) if nodes is None else tuple(nodes)
    ranked = select_nodes(graph, order)
    if sorted(order) != sorted(node.name for node in graph):
        raise InputError(f"An order holds each of the {len(graph)} nodes once; this one holds {len(order)}.")
    chosen = check_sizes(len(graph), sizes)
    check_pairs(model, pairs)

    def of_batch(batch: Pairs, corrupted: Any) -> list[Tensor]:
        return [patched_metric(model, batch.clean, ranked[n:], corrupted, batch.metric) for n in chosen]

    settings = {"nodes": [repr(n) for n in ranked], "sizes": list(chosen), "job": "faithfulness_curve"}
    found = measure(model, pairs, ranked, of_batch, folder, settings, "faithfulness")
    gap = float((found["clean"] - found["empty"]).mean())
    if abs(gap) < 1e-9:
        raise InputError("The metric is on average the same for both inputs, so faithfulness has no scale.")
    return FaithfulnessCurve(**found, sizes=chosen, order=tuple(order))


def check_sizes(n: int, sizes: Sequence[int] | None) -> tuple[int, ...]:
    """The sizes to measure in a graph of n parts, with MIB's. Raises: InputError for one that cannot be."""
    if sizes is None:
        powers = [2**i for i in range(n.bit_length())]
        sizes = range(n + 1) if n <= _EVERY_SIZE else powers
    wrong = [k for k in sizes if not 0 <= k <= n]
    if wrong:
        raise InputError(f"A circuit of {wrong[0]} parts: the graph has {n}.")
    return tuple(sorted({*sizes, *(int(share * n) for share in SHARES)}))


def measure(
    model: Model,
    pairs: Sequence[Pairs],
    nodes: Sequence[Node],
    of_batch: Callable[[Pairs, Any], list[Tensor]],
    folder: str | Path | None,
    settings: dict[str, Any],
    label: str,
) -> dict[str, Tensor]:
    """The metric [run, row] of what `of_batch` runs, and that of the clean and the corrupted inputs."""
    data = [[batch.clean, batch.corrupted] for batch in pairs]
    made_of = {"models": {"model": model}, "data": data, "metric": [b.metric for b in pairs], **settings}
    parts: list[dict[str, Tensor]] = []
    bar = tqdm(total=len(pairs), desc=label, unit="batch", disable=None, leave=False)
    with bar, kept(folder, **made_of) as work:
        for number, batch in enumerate(pairs):

            def one(batch: Pairs = batch) -> dict[str, Tensor]:
                corrupted = store(model, batch.corrupted, nodes, batch.metric)
                clean = row_values(batch.metric, model.run(batch.clean))
                runs = torch.stack(of_batch(batch, corrupted))
                return {"metric": runs, "clean": clean, "empty": corrupted.metric}

            parts.append(work.tensors(f"batch {number}", one))
            bar.update()
    return {key: torch.cat([part[key] for part in parts], -1) for key in parts[0]}


def _ratio(
    metric: NDArray[np.float64], clean: NDArray[np.float64], empty: NDArray[np.float64], axis: int = -1
) -> NDArray[np.float64]:
    nothing = empty.mean(axis)
    return (metric.mean(axis) - nothing) / (clean.mean(axis) - nothing)
