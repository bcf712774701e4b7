"""How much each edge carries: what a node writes, times what each reader of the stream would feel of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from methods_multimodal.attribution import differentiable_sum, midpoints
from methods_multimodal.circuits.node_scores import by_row, entry_path
from methods_multimodal.circuits.nodes import Node, circuit_nodes
from methods_multimodal.circuits.pairs import Pairs, check_pairs, check_rows, check_scale
from methods_multimodal.circuits.patched import Stored, store
from methods_multimodal.circuits.stream import Reader, Stream, edge_products, layers_of
from methods_multimodal.core.kept import kept
from methods_multimodal.core.record import Record
from mm_adapters import Edit, MissingSiteError, Model, Read

_ROLES = ("vision", "text", "language")


@dataclass(frozen=True)
class EdgeScores(Record):
    """To first order the metric's change if a node's change reaches one reader alone: corrupted less clean.

    Names are MIB's: "a0.h1->a2.h3<q>", "m0->m1", "v.m2->p", "p->a0.h1<v>", "m3->logits". Keys and values that
    several heads share are one reader, "a1.g0<k>".
    """

    scores: Float[Tensor, "row edge"]
    clean: Float[Tensor, " row"]
    corrupted: Float[Tensor, " row"]
    edges: tuple[str, ...]
    points: int

    @property
    def mean(self) -> Float[Tensor, " edge"]:
        """Each edge's score, over rows."""
        return self.scores.mean(0)

    def order(self, *, absolute: bool = False) -> tuple[str, ...]:
        """The edges from the most helpful on (most negative first), or by size."""
        ranked = -self.mean.abs() if absolute else self.mean
        return tuple(self.edges[i] for i in torch.argsort(ranked, stable=True))

    def of_sources(self) -> dict[str, Float[Tensor, " row"]]:
        """The sum over each source's edges: by linearity the node's own score, to first order."""
        sums: dict[str, Tensor] = {}
        for column, edge in enumerate(self.edges):
            source = edge.partition("->")[0]
            sums[source] = sums.get(source, torch.zeros(())) + self.scores[:, column]
        return sums


def score_edges(
    model: Model,
    pairs: Sequence[Pairs],
    *,
    method: Literal["integrated", "gradient"] = "integrated",
    points: int = 5,
    folder: str | Path | None = None,
) -> EdgeScores:
    """Scores every edge within the towers, and across the projector, over batches of pairs.

    One forward and one backward for each point, and no queries, keys or values computed apart: a reader's
    gradient is its projection's, taken back through the norm of its block by the formula. That these add up
    to the gradient of the block's own stream is checked in every run. Norms are live, not frozen.

    Args:
        pairs: Batches of rows; memory is that of one batch.
        method: "gradient" at the clean run (EAP), or "integrated" over midpoints of the path (EAP-IG-inputs).
        points: How many midpoints.
        folder: Where batches are written down as they are done; a call that was killed goes on there.

    Source: Syed et al. 2023, arXiv 2310.10348 (EAP); Hanna et al. 2024, arXiv 2403.17806 (EAP-IG).
    Raises: MissingSiteError for towers without such blocks; InputError for blocks whose parts do not add up,
        and as `score_nodes`.
    """
    shares = midpoints(points) if method == "integrated" else (None,)
    streams = streams_of(model)
    check_pairs(model, pairs)
    check_rows(model, pairs)
    entries = [node for node in circuit_nodes(model) if node.kind == "input"]
    data = [[batch.clean, batch.corrupted] for batch in pairs]
    made_of: dict[str, Any] = {"models": {"model": model}, "data": data, "metric": [b.metric for b in pairs]}
    made_of |= {"method": method, "points": points}
    parts: list[EdgeScores] = []
    bar = tqdm(total=len(pairs), desc="scoring edges", unit="batch", disable=None, leave=False)
    with bar, kept(folder, job="score_edges", **made_of) as work:
        for number, batch in enumerate(pairs):

            def one(batch: Pairs = batch) -> EdgeScores:
                return _of_batch(model, streams, entries, batch, shares)

            parts.append(work.record(f"batch {number}", EdgeScores, one))
            bar.update()
    return EdgeScores(
        scores=torch.cat([part.scores for part in parts]),
        clean=torch.cat([part.clean for part in parts]),
        corrupted=torch.cat([part.corrupted for part in parts]),
        edges=parts[0].edges,
        points=parts[0].points,
    )


def streams_of(model: Model) -> tuple[Stream, ...]:
    """The streams whose edges are scored. Raises: MissingSiteError for a tower that is no such stream."""
    towers = [view for view in model.towers.values() if view.role in _ROLES]
    if not towers or model.loops():
        have = ", ".join(model.towers)
        raise MissingSiteError(
            f"{model.name}: edges are scored in vision, text and language towers outside sampling loops; its "
            f"towers: {have}, which have no *.blocks.0.hook_resid_mid to score from. Score its nodes."
        )
    speaks = any(view.role == "language" for view in towers)
    return tuple(
        Stream.of(model, view, "p" if speaks and view.role == "vision" else "logits") for view in towers
    )


@torch.no_grad()
def _of_batch(
    model: Model,
    streams: Sequence[Stream],
    entries: Sequence[Node],
    batch: Pairs,
    shares: Sequence[float | None],
) -> EdgeScores:
    sites = [site for stream in streams for site in stream.value_sites()]
    clean = store(model, batch.clean, entries, batch.metric, sites)
    corrupted = store(model, batch.corrupted, entries, batch.metric, sites)
    check_scale(clean.metric, corrupted.metric)
    moved = {site: corrupted.values[site].float() - clean.values[site].float() for site in sites}
    written = [_Written.of(stream, moved, clean) for stream in streams]
    path = entry_path(entries, clean, corrupted)
    reads = [Read(site) for stream in streams for site in stream.grad_sites()]
    reads += [Read(site, grad=False) for stream in streams for site in stream.norm_sites()]
    names: list[str] = []
    total = torch.zeros(())
    for share in shares:
        edits = [] if share is None else [Edit(site, ends.at(share)) for site, ends in path.items()]
        run = model.run(batch.clean, read=reads, edit=edits, grad_of=differentiable_sum(batch.metric, []))
        found = [
            (block, by_row(products, len(clean.metric), one.stream.view.name))
            for one in written
            for block, products in one.edges(run.grads, run.values)
        ]
        names = [name for block, _ in found for name in block]
        total = total + torch.cat([products for _, products in found], 1).cpu() / len(shares)
    points = 0 if shares[0] is None else len(shares)
    return EdgeScores(total, clean.metric, corrupted.metric, tuple(names), points)


@dataclass(frozen=True)
class _Written:
    """What each node of a stream writes into it, in order, and how many come before each layer."""

    stream: Stream
    names: tuple[str, ...]
    added: Float[Tensor, "source row pos d_model"]
    n_first: int

    @classmethod
    def of(cls, stream: Stream, moved: Mapping[str, Tensor], clean: Stored) -> _Written:
        first = moved[stream.site(0, "hook_resid_pre")]
        names, added = [f"{stream.prefix}input"], [first[None]]
        if stream.view.role == "language" and clean.no_image is not None:
            outside = clean.no_image[..., None]
            names, added = ["p", *names], [(first * ~outside)[None], (first * outside)[None]]
        n_first = len(names)
        for layer in layers_of(stream):
            heads = stream.heads(layer, moved)
            names += [f"{stream.prefix}a{layer}.h{head}" for head in range(len(heads))]
            names.append(f"{stream.prefix}m{layer}")
            added += [heads, stream.mlp(layer, moved)[None]]
        return cls(stream, tuple(names), torch.cat(added), n_first)

    def edges(
        self, grads: Mapping[str, Tensor], values: Mapping[str, Tensor]
    ) -> Iterator[tuple[list[str], Float[Tensor, "row edge"]]]:
        """The names and products of the edges into each layer's readers, and into the end."""
        stream, n = self.stream, self.n_first
        last = stream.last_layer(grads)
        for layer in range(last + 1):
            yield self._into(stream.attention_readers(layer, grads, values), n)
            n += stream.n_heads(layer)
            yield self._into([stream.mlp_reader(layer, grads, values)], n)
            n += 1
        end = grads[stream.site(last, "hook_resid_post")].float()
        yield self._into([Reader(stream.end, stream.end, end)], n)

    def _into(self, readers: Sequence[Reader], n: int) -> tuple[list[str], Float[Tensor, "row edge"]]:
        products = edge_products(self.added[:n], readers)
        names = [f"{source}->{reader.name}" for source in self.names[:n] for reader in readers]
        return names, products.flatten(1)
