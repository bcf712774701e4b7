"""How well cheap scores find the circuits of the zoo's models, beside exact patching and baselines.

python -m tests.quality.circuits [--only llava:colour ...] [--score 32] [--report 48] [--out FOLDER]

Scores are made on pairs of the split "validation", circuits are judged on pairs of "test". CPR is of the
signed order, CMD of the order by size, as in MIB; the size is the smallest with f >= 0.9. Every number is of
nodes, patched with the twin's values at all positions.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mm_adapters as mm
from methods_multimodal.circuits import (
    FaithfulnessCurve,
    Node,
    NodeScores,
    Pairs,
    baseline_orders,
    check_circuit,
    circuit_nodes,
    faithfulness_curve,
    score_nodes,
)
from tests.quality import circuit_tasks

STEPS, GROUPS = 6, ((0, 1), (2, 3), (4, 5))
METHODS = ("exact", "integrated", "gradient", "graddrop", "norm")


@dataclass(frozen=True)
class Task:
    """A model, a question about it, and how many pairs of a split are made of it."""

    name: str
    model: str
    pairs: Callable[[Any, int, str], list[Pairs]]
    steps: tuple[tuple[int, ...], ...] | None = None
    share: int = 1

    def graph(self, model: Any) -> tuple[Node, ...]:
        """The nodes that are ranked."""
        return circuit_nodes(model, steps=self.steps)


def _llava(kind: str) -> Task:
    return Task(
        f"llava:{kind}",
        "tiny-llava",
        lambda model, n, split: circuit_tasks.llava_pairs(model, kind, n, split=split),
    )


def _clip(side: str) -> Task:
    return Task(
        f"clip:{side}",
        "tiny-clip",
        lambda model, n, split: circuit_tasks.clip_pairs(model, side, n, split=split),
    )


def _sd(kind: str) -> Task:
    return Task(
        f"sd:{kind}",
        "tiny-sd",
        lambda model, n, split: circuit_tasks.sd_pairs(model, kind, n, steps=STEPS, split=split),
        GROUPS,
        4,
    )


TASKS = {
    task.name: task
    for task in (
        *map(_llava, circuit_tasks.KINDS),
        *map(_clip, ("image", "text", "joint")),
        *map(_sd, ("colour", "shape")),
    )
}


def shuffled(name: str) -> Any:
    """The model with each weight's numbers shuffled: as large as they were, and knowing nothing."""
    model = mm.load(name)
    rng = torch.Generator().manual_seed(0)
    wrapped = model.wrapped
    parts = wrapped.components.values() if hasattr(wrapped, "components") else [wrapped]
    for module in (part for part in parts if isinstance(part, torch.nn.Module)):
        for weight in module.parameters():
            order = torch.randperm(weight.numel(), generator=rng)
            weight.data = weight.data.flatten()[order].reshape(weight.shape)
    return model


def table(task: Task, n_score: int, n_report: int, out: Path | None) -> dict[str, Any]:
    """The numbers of one task, by method."""
    model = mm.load(task.model)
    graph = task.graph(model)
    n_score, n_report = max(2, n_score // task.share), max(2, n_report // task.share)
    to_score, to_report = task.pairs(model, n_score, "validation"), task.pairs(model, n_report, "test")
    found = {m: score_nodes(model, to_score, graph, method=m) for m in METHODS}  # type: ignore[arg-type]
    orders = {m: scores.order() for m, scores in found.items()}
    by_size = {m: scores.order(absolute=True) for m, scores in found.items()}
    untrained = score_nodes(shuffled(task.model), to_score, graph)
    orders |= {"untrained": untrained.order()}
    by_size |= {"untrained": untrained.order(absolute=True)}
    orders |= {name: order for name, order in baseline_orders(graph).items() if name != "random"}
    coarse = None if task.share == 1 else [*range(0, len(graph), 4)]
    rows: dict[str, Any] = {}
    curves: dict[str, FaithfulnessCurve] = {}
    for name, order in orders.items():
        curves[name] = faithfulness_curve(model, to_report, order, graph, sizes=coarse)
        other = by_size.get(name)
        of_size = faithfulness_curve(model, to_report, other, graph, sizes=[]) if other else curves[name]
        rows[name] = _row(curves[name], of_size) | _agreement(found.get(name), found["exact"])
        print(f"  {name:<12} {_line(rows[name])}", file=sys.stderr, flush=True)
    drawn = [baseline_orders(graph, seed)["random"] for seed in range(6)]
    random = [faithfulness_curve(model, to_report, order, graph, sizes=[]) for order in drawn]
    rows["random"] = _spread(random)
    best = curves["integrated"]
    circuit = best.order[: best.size_at(0.9)]
    check = check_circuit(model, to_report, circuit, graph, n_random=20 if task.share == 1 else 8)
    clean, empty = float(best.clean.mean()), float(best.empty.mean())
    result = {"nodes": len(graph), "clean": clean, "corrupted": empty, "rows": rows}
    result["circuit"] = {
        "nodes": list(circuit),
        "f": check.faithfulness,
        "completeness": check.completeness,
        "minimality": check.minimality,
        "z": check.z,
        "random": [float(check.random_faithfulness.mean()), float(check.random_faithfulness.std())],
    }
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{task.name.replace(':', '_')}.json").write_text(json.dumps(result, indent=1), "utf-8")
    return result


def transfer(name: str, n_score: int, n_report: int) -> dict[str, Any]:
    """f of a circuit of one-object scenes in other scenes: pairs never trained on, and two objects."""
    model, kind = mm.load("tiny-llava"), name.partition(":")[2]
    order = score_nodes(model, TASKS[name].pairs(model, n_score, "validation")).order()
    kept: dict[str, Any] = {}
    others: dict[str, dict[str, Any]] = {"test": {"split": "test"}, "novel pairs": {"split": "novel"}}
    if kind in ("colour", "shape"):
        others["two objects"] = {"split": "test", "scenes": "two"}
    size = 0
    for where, options in others.items():
        pairs = circuit_tasks.llava_pairs(model, kind, n_report, **options)
        if not size:
            size = faithfulness_curve(model, pairs, order).size_at(0.9)
        found = faithfulness_curve(model, pairs, order, sizes=[size])
        at = found.sizes.index(size)
        low, high = found.interval("faithfulness")[:, at]
        kept[where] = [size, float(found.faithfulness[at]), float(low), float(high)]
    return kept


def _row(signed: FaithfulnessCurve, absolute: FaithfulnessCurve) -> dict[str, Any]:
    bounds = {name: [float(x) for x in signed.interval(name)] for name in ("cpr", "log_area")}
    return {
        "cpr": signed.cpr(),
        "cmd": absolute.cmd(),
        "log_area": signed.log_area(),
        "size": signed.size_at(0.9),
        "bounds": bounds | {"cmd": [float(x) for x in absolute.interval("cmd")]},
    }


def _agreement(scores: NodeScores | None, exact: NodeScores) -> dict[str, Any]:
    if scores is None or scores.method == "norm":
        return {}
    a, b = scores.mean.double().numpy(), exact.mean.double().numpy()
    largest = int(np.abs(b).argmax())
    return {
        "pearson": float(np.corrcoef(a, b)[0, 1]),
        "largest": float(a[largest] / b[largest]),
        "completeness": scores.completeness,
    }


def _spread(curves: Sequence[FaithfulnessCurve]) -> dict[str, Any]:
    values = {"cpr": [c.cpr() for c in curves], "cmd": [c.cmd() for c in curves]}
    values["log_area"] = [c.log_area() for c in curves]
    row: dict[str, Any] = {name: float(np.mean(v)) for name, v in values.items()}
    return row | {"size": None, "sd": {name: float(np.std(v, ddof=1)) for name, v in values.items()}}


def _line(row: dict[str, Any]) -> str:
    parts = []
    for name in ("cpr", "cmd", "log_area"):
        bounds = row["bounds"][name] if "bounds" in row else None
        spread = f"[{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else f"sd {row['sd'][name]:.3f}"
        parts.append(f"{name} {row[name]:.3f} {spread}")
    parts.append(f"size {row['size']}")
    parts += [f"{k} {row[k]:.3f}" for k in ("pearson", "largest", "completeness") if k in row]
    return "  ".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--score", type=int, default=32)
    parser.add_argument("--report", type=int, default=48)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--transfer", action="store_true")
    given = parser.parse_args(argv)
    for name in given.only:
        began = time.monotonic()
        result = table(TASKS[name], given.score, given.report, given.out)
        ends = f"{result['clean']:.2f} clean, {result['corrupted']:.2f} corrupted"
        head = f"{result['nodes']} nodes, metric {ends} ({time.monotonic() - began:.0f} s)"
        print(f"\n## {name}: {head}\n", flush=True)
        for method, row in result["rows"].items():
            print(f"{method:<12} {_line(row)}", flush=True)
        print(f"circuit {json.dumps(result['circuit'])}", flush=True)
        if given.transfer and name.startswith("llava"):
            print(f"transfer {json.dumps(transfer(name, given.score, given.report))}", flush=True)


if __name__ == "__main__":
    main()
