"""A page on what carries the difference between inputs and their twins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from methods_multimodal.circuits import (
    NodeScores,
    Pairs,
    check_circuit,
    faithfulness_curve,
    score_edges,
    score_nodes,
    write_mib,
)
from methods_multimodal.plots import circuit_map, faithfulness_lines
from methods_multimodal.report._page import Report, new_page, rounded
from mm_adapters import Model

_KEPT = 0.9


def circuit_report(
    model: Model,
    pairs: Sequence[Pairs],
    *,
    model_name: str = "",
    exact: bool = False,
    edges: bool = False,
    mib: Path | None = None,
) -> Report:
    """Scores the nodes, keeps as many of the best as keep 90 % of the difference, and tests those.

    With four batches of pairs or more the nodes are chosen on the first half and tested on the second.

    Args:
        model: The model.
        pairs: Batches of pairs.
        model_name: What to call it on the page.
        exact: Whether every node is patched, rather than estimated along a path.
        edges: Whether the largest edges are drawn.
        mib: Where the edges are written for MIB's tools.

    Raises: as `score_nodes` and `score_edges`.
    """
    half = len(pairs) // 2
    to_score, to_judge = (pairs[:half], pairs[half:]) if half > 1 else (pairs, pairs)
    of_edges = score_edges(model, to_score) if edges or mib is not None else None
    scores = score_nodes(model, to_score, method="exact" if exact else "integrated")
    curve = faithfulness_curve(model, to_judge, scores.order())
    kept = scores.order()[: curve.size_at(_KEPT)]
    check = check_circuit(model, to_judge, kept)
    if of_edges is not None and mib is not None:
        write_mib(model, of_edges, mib, tower="language" if "language" in model.towers else "vision")
    page = new_page(13.0, 8.5, f"{model_name}: what carries the difference between inputs and their twins")
    top, bottom = page.subplots(2, 1, height_ratios=[2, 1])
    circuit_map(scores, top, circuit=kept, edges=of_edges if edges else None, title=_title(scores))
    faithfulness_lines({scores.method: curve}, bottom, title="nodes kept, in the order of their scores")
    judged = "other pairs" if half > 1 else "the pairs it was chosen on"
    drawn = check.random_faithfulness
    lines = (
        f"{len(kept)} of {len(scores.nodes)} nodes keep {check.faithfulness:.0%} of the effect, on {judged}",
        f"as many random nodes of each layer keep {float(drawn.mean()):.0%} ± {float(drawn.std()):.0%}",
        f"without them {check.completeness:.0%} is left; {check.minimality:.0%} of them are not needed",
        "largest: " + ", ".join(f"{n} {scores.mean[scores.nodes.index(n)]:+z.2f}" for n in kept[:6]),
    )
    page.supxlabel("\n".join(lines[:3]), fontsize=9)
    numbers = {
        "model": model_name,
        "method": scores.method,
        "completeness": None if exact else scores.completeness,
        "nodes": dict(zip(scores.nodes, rounded(scores.mean), strict=True)),
        "circuit": list(kept),
        "judged on": judged,
        "faithfulness": check.faithfulness,
        "without": check.completeness,
        "random": rounded(drawn),
        "cpr": curve.cpr(),
        "cmd": curve.cmd(),
    }
    return Report(page, numbers, lines)


def _title(scores: NodeScores) -> str:
    if scores.method == "exact":
        return "each node patched alone"
    off = abs(scores.completeness - 1)
    warning = "" if off <= 0.3 else ": sizes are poor, read the order"
    return f"estimated along the path; the sum is {scores.completeness:.0%} of the whole effect{warning}"
