"""Circuits as the JSON that MIB's and EAP-IG's tools read."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from methods_multimodal.circuits.edge_scores import EdgeScores
from methods_multimodal.core.files import write_json
from mm_adapters import CheckpointError, InputError, Model


def write_mib(
    model: Model,
    scores: EdgeScores,
    path: str | Path,
    *,
    circuit: Collection[str] = (),
    tower: str = "language",
) -> Path:
    """Writes {"cfg", "nodes", "edges"}: each edge's mean score, and whether it is in the circuit.

    MIB gives every query head keys and values of its own; where several share them, each head has the score
    of what they share. Edges of other towers keep their prefix and stand beside, where MIB's readers, which
    look edges up by name, leave them alone.

    Source: the code of Mueller et al. 2025, arXiv 2504.13151, and Hanna et al. 2024, arXiv 2403.17806.
    Raises: InputError for an edge of the circuit that has no score; MissingSiteError for no such tower.
    """
    unknown = sorted(set(circuit) - set(scores.edges))
    if unknown:
        raise InputError(f"The circuit holds {unknown[0]}, which has no score.")
    view = model.check_tower(tower)
    shape = view.weights(0).names("attn")["W_O"]().shape
    cfg = {"n_layers": view.n_layers(), "n_heads": shape[0], "parallel_attn_mlp": False, "d_model": shape[2]}
    counts = {
        (site.tower, int(site.layer or 0)): (site.n_heads, model.check_site(f"{site.name[:-1]}k").n_heads)
        for site in model.sites("*.blocks.*.attn.hook_q")
        if site.reason is None
    }
    groups = {tower_layer: (q or 1) // (k or q or 1) for tower_layer, (q, k) in counts.items()}
    edges: dict[str, Any] = {}
    for edge, score in zip(scores.edges, scores.mean.tolist(), strict=True):
        for name in _ungrouped(edge, groups, tower):
            edges[name] = {"score": score, "in_graph": edge in circuit}
    kept = {end for name, edge in edges.items() if edge["in_graph"] for end in _nodes_of(name)}
    nodes = {end: {"in_graph": end in kept} for name in edges for end in _nodes_of(name)}
    write_json(Path(path), {"cfg": cfg, "nodes": nodes, "edges": edges})
    return Path(path)


def read_mib(path: str | Path) -> dict[str, float]:
    """The scores of a file's edges, by name; also of files that MIB's tools wrote.

    Raises: CheckpointError if the file holds no such graph.
    """
    try:
        edges = json.loads(Path(path).read_text("utf-8"))["edges"]
        return {name: float(edge["score"]) for name, edge in edges.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} holds no graph with scored edges ({type(error).__name__}).") from None


def _ungrouped(edge: str, groups: dict[tuple[str, int], int], tower: str) -> list[str]:
    match = re.fullmatch(r"(.*->)(.*)a(\d+)\.g(\d+)(<[kv]>)", edge)
    if match is None:
        return [edge]
    before, prefix, layer, group, kind = match.groups()
    size = groups[tower, int(layer)]
    heads = range(int(group) * size, (int(group) + 1) * size)
    return [f"{before}{prefix}a{layer}.h{head}{kind}" for head in heads]


def _nodes_of(edge: str) -> tuple[str, str]:
    source, _, reader = edge.partition("->")
    return source, reader.partition("<")[0]
