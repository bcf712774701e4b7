"""How much each node carries of the difference between two inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from methods_multimodal.attribution import Ends, midpoints, path_gradients
from methods_multimodal.circuits.nodes import Node, circuit_nodes
from methods_multimodal.circuits.pairs import Pairs, check_pairs, check_rows, check_scale
from methods_multimodal.circuits.patched import Stored, patched_metric, rows_of, sites_of, store
from methods_multimodal.core.kept import kept
from methods_multimodal.core.record import Record
from mm_adapters import InputError, Model

NodeMethod = Literal["integrated", "gradient", "graddrop", "exact", "norm"]


@dataclass(frozen=True)
class NodeScores(Record):
    """The change of the metric when each node alone gets its corrupted value, or an estimate of it.

    MIB's sign: corrupted less clean, so that a node which helps is negative. `explained` is the sum of the
    estimates over what the model reads; by completeness it is `corrupted - clean` for integrated gradients
    with enough points, and NaN for exact scores, which need no such thing.
    """

    scores: Float[Tensor, "row node"]
    clean: Float[Tensor, " row"]
    corrupted: Float[Tensor, " row"]
    explained: Float[Tensor, " row"]
    nodes: tuple[str, ...]
    method: str
    points: int
    forwards: int
    backwards: int

    @property
    def mean(self) -> Float[Tensor, " node"]:
        """Each node's score, over rows."""
        return self.scores.mean(0)

    @property
    def completeness(self) -> float:
        """What the estimates add up to, as a share of the whole effect: 1 is right."""
        return float(self.explained.mean() / (self.corrupted - self.clean).mean())

    def order(self, *, absolute: bool = False) -> tuple[str, ...]:
        """The nodes from the most helpful on (most negative first), or by size."""
        ranked = -self.mean.abs() if absolute else self.mean
        return tuple(self.nodes[i] for i in torch.argsort(ranked, stable=True))


def score_nodes(
    model: Model,
    pairs: Sequence[Pairs],
    nodes: Sequence[Node] | None = None,
    *,
    method: NodeMethod = "integrated",
    points: int = 20,
    folder: str | Path | None = None,
) -> NodeScores:
    """Scores every node over batches of pairs.

    Args:
        pairs: Batches of rows; memory is that of one batch.
        nodes: Which nodes (None: `circuit_nodes`).
        method: "exact" runs once for each node. "gradient" is attribution patching: (corrupted - clean) times
            the gradient at the clean run. "integrated" takes the mean gradient at the midpoints of the
            straight path between the two inputs' embeddings (EAP-IG-inputs with midpoints). "graddrop" takes
            the mean size over runs in which one layer's branches pass no gradient (AtP*), and has no sign.
            "norm" is how far the node moves, a baseline that knows nothing of the metric. The last two are
            written as negative numbers, so that orders begin with the largest.
        points: How many midpoints "integrated" takes.
        folder: Where batches are written down as they are done; a call that was killed goes on there.

    Source: Nanda 2023, "Attribution patching"; Kramár et al. 2024, arXiv 2403.00745, sections 2 and 3.3
        (GradDrop); Hanna et al. 2024, arXiv 2403.17806 (EAP-IG).
    Raises: InputError for pairs of unequal layout, a metric without a gradient, or one that is saturated;
        MissingSiteError for a model without nodes.
    """
    if method not in get_args(NodeMethod):
        raise InputError(f"method={method!r}; there is {', '.join(get_args(NodeMethod))}.")
    shares = midpoints(points) if method == "integrated" else ()
    chosen = circuit_nodes(model) if nodes is None else tuple(nodes)
    if not chosen:
        raise InputError("There are no nodes to score.")
    check_pairs(model, pairs)
    if method != "exact":
        check_rows(model, pairs)
    entries = [node for node in circuit_nodes(model) if node.kind == "input"]
    of_batch = _METHODS[method]
    settings: dict[str, Any] = {"nodes": [repr(n) for n in chosen], "method": method, "points": points}
    data = [[batch.clean, batch.corrupted] for batch in pairs]
    metrics = [batch.metric for batch in pairs]
    made_of = {"models": {"model": model}, "data": data, "metric": metrics, **settings}
    parts: list[dict[str, Tensor]] = []
    bar = tqdm(total=len(pairs), desc="scoring nodes", unit="batch", disable=None, leave=False)
    with bar, kept(folder, job="score_nodes", **made_of) as work:
        for number, batch in enumerate(pairs):

            def one(batch: Pairs = batch) -> dict[str, Tensor]:
                clean = store(model, batch.clean, [*chosen, *entries], batch.metric)
                corrupted = store(model, batch.corrupted, [*chosen, *entries], batch.metric)
                check_scale(clean.metric, corrupted.metric)
                found = of_batch(model, batch, chosen, entries, clean, corrupted, shares)
                return found | {"clean": clean.metric, "corrupted": corrupted.metric}

            parts.append(work.tensors(f"batch {number}", one))
            bar.update()
    joined = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    forwards, backwards = _cost(method, chosen, points, model)
    return NodeScores(
        **joined,
        nodes=tuple(node.name for node in chosen),
        method=method,
        points=points if method == "integrated" else 0,
        forwards=forwards,
        backwards=backwards,
    )


def node_products(
    nodes: Sequence[Node], clean: Stored, corrupted: Stored, grads: dict[str, Tensor]
) -> Float[Tensor, "row node"]:
    """(corrupted - clean) times a gradient at each node, summed over all but the rows."""
    columns: list[Tensor] = []
    for node in nodes:
        product = (corrupted.values[node.site].float() - clean.values[node.site].float()) * grads[node.site]
        calls = clean.calls.get(node.site, ())
        if calls:
            if node.steps is not None:
                product = product[[i for i, call in enumerate(calls) if call.step in node.steps]]
            product = reduce(product, "call ... -> ...", "sum")
        if node.head is not None:
            product = product[..., node.head, :]
        if (only := clean.only(node)) is not None:
            product = product * only[..., None]
        columns.append(by_row(product.flatten(1).sum(1), len(clean.metric), node.tower))
    return torch.stack(columns, 1).cpu()


def by_row(products: Float[Tensor, "own ..."], n_rows: int, tower: str) -> Float[Tensor, "row ..."]:
    """A tower's products for each row of the metric; of a single row they are added up.

    Raises: InputError if there are several rows, and as many others in the tower.
    """
    if n_rows == 1:
        return products.sum(0, keepdim=True)
    if len(products) != n_rows:
        raise InputError(
            f"The metric gives {n_rows} rows and the {tower} tower has {len(products)}: it is not known "
            "which belong together. Give one image with its texts a batch, or a text for each image."
        )
    return products


def _exact(
    model: Model,
    batch: Pairs,
    nodes: Sequence[Node],
    entries: Sequence[Node],
    clean: Stored,
    corrupted: Stored,
    shares: Sequence[float],
) -> dict[str, Tensor]:
    each = [patched_metric(model, batch.clean, [node], corrupted, batch.metric) for node in nodes]
    nothing = torch.full_like(clean.metric, torch.nan)
    return {"scores": torch.stack(each, 1) - clean.metric[:, None], "explained": nothing}


def _along_path(
    model: Model,
    batch: Pairs,
    nodes: Sequence[Node],
    entries: Sequence[Node],
    clean: Stored,
    corrupted: Stored,
    shares: Sequence[float],
) -> dict[str, Tensor]:
    path = entry_path(entries, clean, corrupted)
    sites = sites_of([*nodes, *entries])
    along = path_gradients(model, batch.clean, sites, path, batch.metric, shares=shares, rows=rows_of(model))
    grads = dict(along.grads)
    explained = node_products(entries, clean, corrupted, grads).sum(1)
    return {"scores": node_products(nodes, clean, corrupted, grads), "explained": explained}


def _graddrop(
    model: Model,
    batch: Pairs,
    nodes: Sequence[Node],
    entries: Sequence[Node],
    clean: Stored,
    corrupted: Stored,
    shares: Sequence[float],
) -> dict[str, Tensor]:
    layers = _branches(model)
    total = torch.zeros(len(clean.metric), len(nodes))
    for branches in layers:
        dropped = path_gradients(
            model,
            batch.clean,
            sites_of(nodes),
            {},
            batch.metric,
            shares=(),
            rows=rows_of(model),
            stopped=branches,
        )
        total += node_products(nodes, clean, corrupted, dict(dropped.grads)).abs()
    nothing = torch.full_like(clean.metric, torch.nan)
    return {"scores": -total / max(1, len(layers) - 1), "explained": nothing}


def _norm(
    model: Model,
    batch: Pairs,
    nodes: Sequence[Node],
    entries: Sequence[Node],
    clean: Stored,
    corrupted: Stored,
    shares: Sequence[float],
) -> dict[str, Tensor]:
    apart = {s: corrupted.values[s].float() - v.float() for s, v in clean.values.items()}
    size = node_products(nodes, clean, corrupted, apart).sqrt()
    return {"scores": -size, "explained": torch.full_like(clean.metric, torch.nan)}


def entry_path(entries: Sequence[Node], clean: Stored, corrupted: Stored) -> dict[str, Ends]:
    """The straight path between two runs in what the towers read.

    Raises: InputError if nothing that is read differs.
    """
    path: dict[str, Ends] = {}
    for node in entries:
        start, end, only = clean.values[node.site], corrupted.values[node.site], clean.only(node)
        differs = start != end if only is None else (start != end) & only[..., None]
        if bool(differs.any()):
            path[node.site] = Ends(start, end, clean.calls.get(node.site, ()), only)
    if not path:
        read = ", ".join(node.site for node in entries) or "nothing"
        raise InputError(
            f"The clean and corrupted inputs are the same at {read}, so there is no path between them."
        )
    return path


def _branches(model: Model) -> list[list[str]]:
    """The sites where each layer of each tower adds to its stream."""
    present = [site for site in model.sites("*_out") if site.reason is None and site.layer is not None]
    layers: dict[tuple[str, str, int], list[str]] = {}
    for site in present:
        if site.part in ("hook_attn_out", "hook_cross_attn_out", "hook_mlp_out"):
            layers.setdefault((site.tower, str(site.stack), int(site.layer or 0)), []).append(site.name)
    return list(layers.values())


def _cost(method: NodeMethod, nodes: Sequence[Node], points: int, model: Model) -> tuple[int, int]:
    """Forwards and backwards for each batch; both inputs' own runs are in the forwards."""
    if method in ("exact", "norm"):
        return 2 + len(nodes) * (method == "exact"), 0
    n = {"gradient": 1, "integrated": points}.get(method) or len(_branches(model))
    return 2 + n, n


_METHODS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "exact": _exact,
    "gradient": _along_path,
    "integrated": _along_path,
    "graddrop": _graddrop,
    "norm": _norm,
}
