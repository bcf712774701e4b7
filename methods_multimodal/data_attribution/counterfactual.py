"""What happens without the examples a scorer names, and with a little more of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import grad
from tqdm.auto import tqdm

from methods_multimodal.core.record import Record
from methods_multimodal.core.statistics import Estimate, bootstrap
from methods_multimodal.data_attribution.task import Batch, Examples, Task, batch_of
from mm_adapters import InputError

Retrain = Callable[[Sequence[int], int], Float[Tensor, " query"]]


@dataclass(frozen=True)
class LeftOut(Record):
    """Losses of queries with everything, and without each method's top examples, [query, seed].

    `removed` are the examples each method named, [query, example].
    """

    full: Float[Tensor, "query seed"]
    without: dict[str, Float[Tensor, "query seed"]]
    removed: dict[str, Int[Tensor, "query example"]]

    def rise(self, method: str, than: str | None = None) -> Estimate:
        """How much leaving out raises the loss, in shares of it; or how much more than another method.

        Raises: InputError for a method that was not run.
        """
        for name in (method, than):
            if name is not None and name not in self.without:
                raise InputError(f"Nothing was left out by {name!r}; by {', '.join(self.without)} there was.")
        base = self.full if than is None else self.without[than]
        return bootstrap((self.without[method] - base) / self.full.mean(1, keepdim=True))


def top(scores: Float[Tensor, "query example"], share: float) -> Int[Tensor, "query rank"]:
    """The most helpful examples of each query: this share of all of them."""
    count = round(share * scores.shape[1])
    if not 0 < count < scores.shape[1]:
        raise InputError(f"{share:.0%} of {scores.shape[1]} examples are {count}: none or all.")
    return scores.topk(count, dim=1).indices


def leave_out(
    removed: Mapping[str, Int[Tensor, "query example"]],
    retrain: Retrain,
    n_examples: int,
    seeds: Sequence[int] = (0, 1, 2),
) -> LeftOut:
    """Retrains without what each method names, for each query by itself, and with everything.

    `retrain(kept examples, seed)` gives the losses of all queries; whatever is asked twice is trained once.
    """
    known: dict[tuple[tuple[int, ...], int], Tensor] = {}
    jobs = [(m, q, s) for m, rows in removed.items() for q in range(len(rows)) for s in seeds]
    n_queries = len(next(iter(removed.values())))

    def losses(gone: set[int], seed: int) -> Tensor:
        kept = tuple(i for i in range(n_examples) if i not in gone)
        if (kept, seed) not in known:
            known[kept, seed] = retrain(kept, seed)
        return known[kept, seed]

    full = torch.stack([losses(set(), seed) for seed in seeds], 1)
    without = {m: torch.empty(n_queries, len(seeds)) for m in removed}
    for method, query, seed in tqdm(jobs, desc="retraining", unit="run", disable=None):
        gone = set(removed[method][query].tolist())
        without[method][query, seeds.index(seed)] = losses(gone, seed)[query]
    return LeftOut(full, without, dict(removed))


def tail_patch(
    task: Task,
    examples: Examples,
    queries: Batch,
    scores: Float[Tensor, "query example"],
    *,
    rate: float,
    k: int = 8,
) -> Estimate:
    """How much a query's measure falls after one step of training on its k highest examples, each alone.

    From the trained weights a step of plain gradient descent at `rate` on one example; positive where it
    helped. The task's first measure is trained and measured.

    Source: Chang et al. 2024, arXiv 2410.17413, section 3 (tail-patch).
    """
    measure, n = task.measures[0], len(queries["index"])
    weights, constants = task.weights(), task.constants()

    def loss(state: Mapping[str, Tensor], batch: Batch) -> Tensor:
        return task.per_example(batch, {**constants, **state})[measure].sum()

    with torch.no_grad():
        before = task.per_example(queries)[measure]
    chosen = scores.topk(min(k, scores.shape[1]), dim=1).indices
    after: dict[int, Tensor] = {}
    for example in tqdm(sorted(set(chosen.flatten().tolist())), desc="tail patches", disable=None):
        step = grad(loss)(weights, batch_of(examples, example, example + 1))
        moved = {name: value - rate * step[name] for name, value in weights.items()}
        with torch.no_grad():
            after[example] = task.per_example(queries, {**constants, **moved})[measure]
    fall = [[float(before[q] - after[e][q]) for e in chosen[q].tolist()] for q in range(n)]
    return bootstrap(torch.tensor(fall))
