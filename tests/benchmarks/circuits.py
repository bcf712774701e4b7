"""What circuits cost: all edges beside the nodes, and beside EAP-IG's own algorithm.

python -m tests.benchmarks.circuits [--small] [--rounds 5]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import mm_adapters as mm
from methods_multimodal.circuits import score_edges, score_nodes
from tests.benchmarks._paired import paired, ratio
from tests.benchmarks._split_edges import split_edges
from tests.quality.circuit_tasks import clip_pairs, llava_pairs

GOALS = {"edges / nodes of tiny-llava": 3.0, "edges / EAP-IG's own, tiny-clip's text tower": 1 / 3}


def time_edges(rounds: int, n: int, points: int) -> dict[str, float]:
    """All edges of tiny-llava beside its nodes, by as many points of a path."""
    model = mm.load("tiny-llava")
    pairs = llava_pairs(model, "colour", n)
    works: dict[str, Any] = {
        "nodes": lambda: score_nodes(model, pairs, points=points),
        "edges": lambda: score_edges(model, pairs, points=points),
    }
    return {"edges / nodes of tiny-llava": ratio(paired(works, rounds), "edges", "nodes")}


def time_split(rounds: int, n: int, points: int) -> dict[str, float]:
    """The edges of tiny-clip beside those of its text tower with an input of its own for each reader.

    Ours are of the image tower, too, whose sequence is nine times as long: not the same work.
    """
    model = mm.load("tiny-clip")
    (pair,) = clip_pairs(model, "text", n, batch=n)
    works: dict[str, Any] = {
        "split": lambda: split_edges(model.wrapped, pair.clean, pair.corrupted, points),
        "ours": lambda: score_edges(model, [pair], points=points),
    }
    return {"edges / EAP-IG's own, tiny-clip's text tower": ratio(paired(works, rounds), "ours", "split")}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args(argv)
    n, points, rounds = (2, 1, 1) if given.small else (16, 5, given.rounds)
    for name, value in {**time_edges(rounds, n, points), **time_split(rounds, n, points)}.items():
        print(f"{name}: {value:.2f} (goal: at most {GOALS[name]:.2f})", flush=True)


if __name__ == "__main__":
    main()
