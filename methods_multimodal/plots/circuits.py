"""A circuit across towers, and how faithful circuits are by size."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from itertools import cycle

from matplotlib.axes import Axes

from methods_multimodal.circuits import EdgeScores, FaithfulnessCurve, NodeScores
from methods_multimodal.plots.heatmap import SIGNED, colour_bar, new_axes, norm_of

_NODE = re.compile(
    r"(?P<tower>.*?\.)?(?P<kind>input|p|logits|[acm])(?P<layer>\d+)?(?:\.[hg](?P<head>\d+))?(?:@.*)?"
)
_COLOURS = ("#2166ac", "#b2182b", "#1b7837", "#762a83", "#e08214", "#878787")


def circuit_map(
    record: NodeScores,
    ax: Axes | None = None,
    *,
    circuit: Collection[str] = (),
    edges: EdgeScores | None = None,
    n_edges: int = 40,
    unit: str = "change of the metric",
    title: str = "",
) -> Axes:
    """Every node in the layer of its tower, coloured by its score; a circuit's nodes have a frame.

    Towers stand side by side in the order they run; heads from below, the MLP above them. Of `edges` the
    largest are drawn, towards the output. Nodes of several step groups lie on one another: give one group's.
    """
    ax = ax or new_axes()
    places, labels = _places(record.nodes)
    scores = dict(zip(record.nodes, record.mean.tolist(), strict=True))
    if edges is not None:
        sizes = dict(zip(edges.edges, edges.mean.abs().tolist(), strict=True))
        drawn = [edge for edge in edges.order(absolute=True)[:n_edges] if _end(edge, places) is not None]
        for edge in drawn:
            (x, y), (u, v) = places[edge.partition("->")[0]], _end(edge, places) or (0.0, 0.0)
            width = 0.4 + 2.6 * sizes[edge] / sizes[drawn[0]]
            ax.plot([x, u], [y, v], color="#777777", linewidth=width, alpha=0.5, zorder=1)
    names = list(record.nodes)
    values = [scores[name] for name in names]
    frame = ["black" if name in circuit else "#bbbbbb" for name in names]
    image = ax.scatter(
        [places[name][0] for name in names],
        [places[name][1] for name in names],
        c=values,
        cmap=SIGNED,
        norm=norm_of(record.mean.numpy(), True, None),
        s=150,
        marker="s",
        edgecolors=frame,
        linewidths=[1.8 if name in circuit else 0.6 for name in names],
        zorder=2,
    )
    ax.set_xticks(range(len(labels)), labels, fontsize=7, rotation=45, ha="right")
    named = dict(sorted({(y, _row(name)) for name, (_, y) in places.items() if _row(name)}))
    ax.set_yticks(list(named), list(named.values()), fontsize=7)
    ax.set_xlim(-0.7, len(labels) - 0.3)
    ax.set_title(title or f"{record.method} scores of {len(names)} nodes", fontsize=10)
    colour_bar(ax, image, f"{unit} if the node has its corrupted value")
    return ax


def faithfulness_lines(
    curves: Mapping[str, FaithfulnessCurve], ax: Axes | None = None, *, title: str = ""
) -> Axes:
    """f by the number of nodes kept, with its interval over rows; 1 is as the whole model."""
    ax = ax or new_axes()
    for (name, curve), colour in zip(curves.items(), cycle(_COLOURS), strict=False):
        low, high = curve.interval("faithfulness")
        ax.plot(curve.sizes, curve.faithfulness.tolist(), label=name, color=colour, linewidth=1.4)
        ax.fill_between(curve.sizes, low, high, color=colour, alpha=0.15, linewidth=0)
    for level in (0.0, 0.9, 1.0):
        ax.axhline(level, color="#bbbbbb", linewidth=0.7, linestyle="--" if level == 0.9 else "-", zorder=0)
    ax.set_xlabel("nodes kept", fontsize=9)
    ax.set_ylabel("faithfulness f (0 nothing, 1 all)", fontsize=9)
    ax.tick_params(labelsize=8)
    ax.legend(fontsize=8, frameon=False)
    ax.set_title(title, fontsize=10)
    return ax


def _places(names: Collection[str]) -> tuple[dict[str, tuple[float, float]], list[str]]:
    """Where each node stands, and what each column is."""
    columns: dict[tuple[str, str], int] = {}
    parsed = {name: _NODE.fullmatch(name) for name in names}
    for match in parsed.values():
        columns.setdefault(_column(match), len(columns))
    n_heads = 1 + max((int(m["head"]) for m in parsed.values() if m and m["head"]), default=0)
    places = {}
    for name, match in parsed.items():
        head = int(match["head"]) if match and match["head"] else None
        row = head if head is not None else n_heads if match and match["kind"] == "m" else (n_heads - 1) / 2
        offset = n_heads + 1 if match and match["kind"] == "c" else 0
        places[name] = (float(columns[_column(match)]), float(row + offset))
    places["logits"] = (float(len(columns)), (n_heads - 1) / 2)
    labels = [f"{tower}{layer}" for tower, layer in columns]
    return places, [*labels, "logits"]


def _column(match: re.Match[str] | None) -> tuple[str, str]:
    if match is None:
        return "", "?"
    return match["tower"] or "", match["layer"] or match["kind"]


def _end(edge: str, places: Mapping[str, tuple[float, float]]) -> tuple[float, float] | None:
    reader = edge.partition("->")[2].partition("<")[0]
    return places.get(reader) or places.get(reader.replace(".g", ".h"))


def _row(name: str) -> str:
    match = _NODE.fullmatch(name)
    if match is None or match["kind"] in ("input", "p", "logits"):
        return ""
    if match["kind"] == "m":
        return "MLP"
    return f"{'cross ' if match['kind'] == 'c' else ''}head {match['head']}" if match["head"] else "attention"
