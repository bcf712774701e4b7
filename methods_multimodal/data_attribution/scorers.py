"""How much each training example helped a query, from stored gradient features.

Every scorer is called with (train store, query features) and gives [query, train]; positive means
helpful: without that example the query's loss would be higher. The store is read a piece at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from methods_multimodal.data_attribution.features import Features, check_match
from mm_adapters import InputError
from mm_adapters.store import Store

ROWS = 4096
Block = Float[Tensor, "query train"]


@runtime_checkable
class Scorer(Protocol):
    """Scores of stored training examples for queries; positive is helpful."""

    def pieces(self, store: Store, queries: Features) -> Iterator[Block]:
        """The scores of one run of training examples after the other, in the store's order.

        Raises: StoreError if the two were not made alike, or lack what is to be compared.
        """
        ...


def scores(scorer: Scorer, store: Store, queries: Features) -> Float[Tensor, "query train"]:
    """All scores, [query, train]."""
    return torch.cat(list(scorer.pieces(store, queries)), 1)


@dataclass(frozen=True)
class Top:
    """The `values` of each query's k highest scores, best first, and which examples have them."""

    values: Float[Tensor, "query k"]
    index: Int[Tensor, "query k"]


def top_k(scorer: Scorer, store: Store, queries: Features, k: int, *, lowest: bool = False) -> Top:
    """Each query's k most helpful examples (or most harmful), in memory that does not grow with the store."""
    if not 1 <= k <= len(store):
        raise InputError(f"There are no top {k} of {len(store)} training examples.")
    best: Tensor | None = None
    at: Tensor | None = None
    start = 0
    for piece in scorer.pieces(store, queries):
        numbers = torch.arange(start, start + piece.shape[1]).expand_as(piece)
        start += piece.shape[1]
        best = piece if best is None else torch.cat([best, piece], 1)
        at = numbers if at is None else torch.cat([at, numbers], 1)
        best, order = best.topk(min(k, best.shape[1]), 1, largest=not lowest)
        at = at.gather(1, order)
    assert best is not None
    assert at is not None
    return Top(best, at)


def columns(store: Store, name: str, rows: int = ROWS) -> Iterator[Float[Tensor, "train feature"]]:
    """A column's rows in float32, a piece at a time."""
    for batch in store.views(rows, [name]):
        yield batch[name].float()


def _dots(
    store: Store, pairs: Sequence[tuple[str, Tensor]], of: Callable[[Tensor], Tensor] = lambda rows: rows
) -> Iterator[Block]:
    """The sum over columns of each (prepared) query's dot product with each row."""
    names = [name for name, _ in pairs]
    for rows in store.views(ROWS, names):
        parts = [query @ of(rows[name].float()).T for name, query in pairs]
        yield torch.stack(parts).sum(0)


@dataclass(frozen=True)
class Dot:
    """The dot product of gradients, averaged over checkpoints: what a step on one does to the other."""

    measure: str = "loss"
    query_measure: str | None = None

    def pieces(self, store: Store, queries: Features) -> Iterator[Block]:
        """The scores, a piece at a time; see `Scorer`."""
        pairs = check_match(store, queries, self.measure, self.query_measure or self.measure)
        yield from _dots(store, [(column, queries.columns[q].float() / len(pairs)) for column, q in pairs])


@dataclass(frozen=True)
class Cosine:
    """The cosine of gradients, averaged over checkpoints."""

    measure: str = "loss"
    query_measure: str | None = None

    def pieces(self, store: Store, queries: Features) -> Iterator[Block]:
        """The scores, a piece at a time; see `Scorer`."""
        pairs = check_match(store, queries, self.measure, self.query_measure or self.measure)
        ready = [(column, F.normalize(queries.columns[q].float(), dim=1) / len(pairs)) for column, q in pairs]
        yield from _dots(store, ready, lambda rows: F.normalize(rows, dim=1))


@dataclass(frozen=True)
class TracIn:
    """The sum over checkpoints of learning rate times the dot product of gradients.

    `rates` are the learning rates, one a checkpoint.

    Source: Pruthi et al. 2020, arXiv 2002.08484, TracInCP.
    """

    rates: tuple[float, ...]
    measure: str = "loss"
    query_measure: str | None = None

    def pieces(self, store: Store, queries: Features) -> Iterator[Block]:
        """The scores, a piece at a time; see `Scorer`. Raises: InputError for too few or many rates."""
        pairs = check_match(store, queries, self.measure, self.query_measure or self.measure)
        yield from _dots(store, _rated(self.rates, pairs, queries))


@dataclass(frozen=True)
class DiffusionReTrac:
    """TracIn with every training gradient scaled to length one, and the query's at every timestep.

    The store is best made with each example's own, recorded training timestep (`timesteps=None`), the
    queries with many timesteps; both must be made with `draws="unit"`, or the scaling is not the paper's.

    Source: Xie et al. 2024, arXiv 2401.09031 (Diffusion-ReTrac).
    """

    rates: tuple[float, ...]
    measure: str = "loss"
    query_measure: str | None = None

    def pieces(self, store: Store, queries: Features) -> Iterator[Block]:
        """The scores, a piece at a time; see `Scorer`. Raises: InputError for gradients not scaled."""
        for name, about in (("store", store.about), ("queries", json.loads(queries.about))):
            if about["draws"] != "unit":
                raise InputError(
                    f"The {name} was made with draws={about['draws']!r}; ReTrac needs draws='unit'."
                )
        pairs = check_match(store, queries, self.measure, self.query_measure or self.measure)
        yield from _dots(store, _rated(self.rates, pairs, queries))


def _rated(
    rates: Sequence[float], pairs: Sequence[tuple[str, str]], queries: Features
) -> list[tuple[str, Tensor]]:
    if len(rates) != len(pairs):
        raise InputError(
            f"There are {len(pairs)} checkpoints and {len(rates)} learning rates; give one for each."
        )
    return [(name, rate * queries.columns[q].float()) for rate, (name, q) in zip(rates, pairs, strict=True)]


@dataclass(frozen=True)
class DataInf:
    """Influence with each module's damped Fisher matrix, its inverse taken as the mean of inverses.

    `damping` times the mean square of a module's features is its damping term. Made for few
    parameters (LoRA); on projected features it is an approximation. Three passes over the store.

    Source: Kwon et al. 2024, arXiv 2310.00902, equation 5; averaged over checkpoints.
    """

    damping: float = 0.1
    measure: str = "loss"
    query_measure: str | None = None
    absolute: bool = field(default=False, kw_only=True)

    def pieces(self, store: Store, queries: Features) -> Iterator[Block]:
        """The scores, a piece at a time; see `Scorer`."""
        pairs = check_match(store, queries, self.measure, self.query_measure or self.measure)
        ready = [
            (name, self._solved(store, name, queries.columns[q].float()) / len(pairs)) for name, q in pairs
        ]
        yield from _dots(store, ready)

    def _solved(self, store: Store, name: str, query: Float[Tensor, "query feature"]) -> Tensor:
        """Each query's features times the inverse, module by module."""
        blocks = [(start, stop) for _, start, stop in store.about["blocks"]]
        n = len(store)
        squares = torch.zeros(query.shape[1], dtype=torch.float64)
        for rows in columns(store, name):
            squares += rows.double().square().sum(0)
        terms = [
            self.damping if self.absolute else self.damping * float(squares[a:b].mean()) / n
            for a, b in blocks
        ]
        pulled = torch.zeros_like(query, dtype=torch.float64)
        for rows in columns(store, name):
            for term, (a, b) in zip(terms, blocks, strict=True):
                part = rows[:, a:b]
                share = (query[:, a:b] @ part.T) / (term + part.square().sum(1))
                pulled[:, a:b] += share.double() @ part.double()
        out = query.double() - pulled / n
        for term, (a, b) in zip(terms, blocks, strict=True):
            out[:, a:b] /= term
        return out.float()
