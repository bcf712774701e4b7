"""One circuit under test: what it keeps, what is left without it, what each of its nodes adds, and chance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from methods_multimodal.circuits.faithfulness import measure
from methods_multimodal.circuits.nodes import Node, circuit_nodes, select_nodes
from methods_multimodal.circuits.pairs import Pairs, check_pairs
from methods_multimodal.circuits.patched import patched_metric
from methods_multimodal.core.generators import generator
from methods_multimodal.core.record import Record
from mm_adapters import InputError, Model

_MINIMAL = 0.01


@dataclass(frozen=True)
class CircuitCheck(Record):
    """The metric with a circuit alone, with all but it, with it less each node, and with random ones alone.

    `random` are circuits with as many nodes in each layer of each tower.
    """

    kept: Float[Tensor, " row"]
    complement: Float[Tensor, " row"]
    without: Float[Tensor, "node row"]
    random: Float[Tensor, "draw row"]
    clean: Float[Tensor, " row"]
    empty: Float[Tensor, " row"]
    nodes: tuple[str, ...]
    random_nodes: tuple[tuple[str, ...], ...]

    @property
    def faithfulness(self) -> float:
        """f of the circuit alone: 1 is as the whole model, 0 as with nothing."""
        return float(self._f(self.kept))

    @property
    def completeness(self) -> float:
        """f of what is left without the circuit: near 0 if the circuit is all that matters."""
        return float(self._f(self.complement))

    @property
    def minimality(self) -> float:
        """The share of its nodes that are not needed: f moves by less than 0.01 without one of them."""
        moved = (self._f(self.without) - self._f(self.kept)).abs()
        return float((moved < _MINIMAL).float().mean())

    @property
    def random_faithfulness(self) -> Float[Tensor, " draw"]:
        """f of each random circuit."""
        return self._f(self.random)

    @property
    def z(self) -> float:
        """How many standard deviations of the random circuits the circuit's f lies above their mean.

        NaN if all of them are alike.
        """
        drawn = self.random_faithfulness
        spread = float(drawn.std())
        return (self.faithfulness - float(drawn.mean())) / spread if spread > 0 else float("nan")

    def _f(self, metric: Tensor) -> Tensor:
        return (metric.mean(-1) - self.empty.mean()) / (self.clean.mean() - self.empty.mean())


def check_circuit(
    model: Model,
    pairs: Sequence[Pairs],
    circuit: Sequence[str],
    nodes: Sequence[Node] | None = None,
    *,
    n_random: int = 20,
    seed: int = 0,
    folder: str | Path | None = None,
) -> CircuitCheck:
    """Tests one circuit beside `n_random` others of the same size and the same profile of layers.

    Use other pairs than those that the circuit was chosen on. Where a circuit holds most of its layers, the
    random ones are much the same, and z says little.

    Source: Wang et al. 2023, arXiv 2211.00593, section 4 (faithfulness, completeness, minimality).
    Raises: InputError for a circuit without nodes, or with nodes that are not there.
    """
    graph = circuit_nodes(model) if nodes is None else tuple(nodes)
    chosen = select_nodes(graph, circuit)
    if not chosen or len(set(circuit)) != len(circuit):
        raise InputError("A circuit holds at least one node, and each once.")
    check_pairs(model, pairs)
    drawn = random_circuits(graph, chosen, n_random, seed)
    circuits = [set(chosen), set(graph) - set(chosen)]
    circuits += [set(chosen) - {node} for node in chosen] + [set(one) for one in drawn]
    order = [[node for node in graph if node not in one] for one in circuits]

    def of_batch(batch: Pairs, corrupted: Any) -> list[Tensor]:
        return [patched_metric(model, batch.clean, out, corrupted, batch.metric) for out in order]

    names = [[node.name for node in out] for out in order]
    settings = {"nodes": [repr(n) for n in graph], "patched": names, "job": "check_circuit"}
    found = measure(model, pairs, graph, of_batch, folder, settings, "checking a circuit")
    runs, n = found["metric"], len(chosen)
    return CircuitCheck(
        kept=runs[0],
        complement=runs[1],
        without=runs[2 : 2 + n],
        random=runs[2 + n :],
        clean=found["clean"],
        empty=found["empty"],
        nodes=tuple(circuit),
        random_nodes=tuple(tuple(node.name for node in one) for one in drawn),
    )


def random_circuits(
    graph: Sequence[Node], circuit: Sequence[Node], n: int, seed: int = 0
) -> list[tuple[Node, ...]]:
    """Circuits drawn at random with as many nodes as this one in each layer of each tower."""
    rng = generator(seed)
    counts = Counter(_layer(node) for node in circuit)
    groups = {layer: [node for node in graph if _layer(node) == layer] for layer in counts}
    drawn: list[tuple[Node, ...]] = []
    for _ in range(n):
        one: list[Node] = []
        for layer, members in groups.items():
            picked = torch.randperm(len(members), generator=rng)[: counts[layer]]
            one += [members[int(i)] for i in picked]
        drawn.append(tuple(one))
    return drawn


def baseline_orders(graph: Sequence[Node], seed: int = 0) -> dict[str, tuple[str, ...]]:
    """Orders that ask nothing of the model: what a method must beat.

    "last layers" from the output back, "attention" heads before MLPs, "random" by the seed. A tower's input
    and the projector come first, except in the random order.
    """
    names = [node.name for node in graph]
    front = [node.name for node in graph if node.kind in ("input", "projector")]
    rest = [node for node in graph if node.name not in front]
    heads = [node.name for node in rest if node.kind != "mlp"]
    mlps = [node.name for node in rest if node.kind == "mlp"]
    shuffled = torch.randperm(len(names), generator=generator(seed))
    return {
        "last layers": (*front, *(node.name for node in reversed(rest))),
        "attention": (*front, *heads, *mlps),
        "random": tuple(names[int(i)] for i in shuffled),
    }


def _layer(node: Node) -> tuple[str, int, tuple[int, ...] | None]:
    return node.tower, node.layer, node.steps
