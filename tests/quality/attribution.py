"""How near estimates by gradients come to exact patching: one-word changes of tiny-sd, twins of tiny-llava.

python -m tests.quality.attribution [--sd 20] [--llava 24] [--split test]

The points of the path were chosen on the split "validation". Each line is over cases: the median Pearson
correlation over parts, how often the largest part is found, the median size of that part by its true one, and
what the estimates add up to by the whole effect.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mm_adapters as mm
from methods_multimodal.circuits import score_nodes
from methods_multimodal.cross_attention import (
    Case,
    attribute_patching,
    clip_contrast,
    grid,
    patch_words,
    step_groups,
)
from tests.quality.circuit_tasks import caption, llava_pairs, twins

STEPS = 8
OPTIONS: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 3.0}


def agreement(estimates: Tensor, exact: Tensor, whole: Tensor | None = None) -> dict[str, float]:
    """The line of estimates [case, part] beside exact effects; `whole` is what they should add up to."""
    a, b = estimates.double().numpy(), exact.double().numpy()
    pearson = [float(np.corrcoef(x, y)[0, 1]) for x, y in zip(a, b, strict=True)]
    rows, largest = np.arange(len(b)), np.abs(b).argmax(1)
    sizes = a[rows, largest] / b[rows, largest]
    line = {
        "cases": len(b),
        "pearson, median": float(np.median(pearson)),
        "pearson, worst": float(np.min(pearson)),
        # Of parts with nearly the same effect, as two bottlenecks of one path, either is the largest.
        "largest found": float((np.abs(b[rows, np.abs(a).argmax(1)] / b[rows, largest]) > 0.98).mean()),
        "its size, median": float(np.median(sizes)),
        "its size within 30 %": float((np.abs(sizes - 1) <= 0.3).mean()),
    }
    if whole is not None:
        line |= {"completeness": float(whole)}
    return line


def of_llava(n: int, split: str, kind: str = "colour") -> dict[str, dict[str, float]]:
    """Nodes of tiny-llava, pair by pair."""
    model = mm.load("tiny-llava")
    pairs = llava_pairs(model, kind, n, split=split)
    exact = score_nodes(model, pairs, method="exact")
    lines: dict[str, dict[str, float]] = {}
    for name, settings in {
        "gradient": {"method": "gradient"},
        "integrated, 5": {"points": 5},
        "integrated, 10": {"points": 10},
        "integrated, 20": {"points": 20},
    }.items():
        found = score_nodes(model, pairs, **settings)  # type: ignore[arg-type]
        off = found.explained / (found.corrupted - found.clean)
        line = agreement(found.scores, exact.scores, torch.tensor(found.completeness))
        lines[name] = line | {"completeness within 5 %": float(((off - 1).abs() <= 0.05).float().mean())}
    return lines


def sd_cases(n: int, split: str) -> list[Case]:
    """One-word changes: colours and shapes in turn. Words may have several tokens."""
    sources = [twins(kind, split) for kind in ("colour", "shape")]
    cases: list[Case] = []
    while len(cases) < n:
        number = len(cases)
        twin = next(sources[number % 2])
        prompt, other = caption(twin.scene), caption(twin.twin)
        cases.append(Case(prompt, twin.answer, other, twin.other, seed=number))
    return cases


def of_sd(n: int, split: str) -> dict[str, dict[str, float]]:
    """Layers x heads x four groups of steps of tiny-sd, by a judge and by a metric linear in the pixels."""
    model, judge = mm.load("tiny-sd"), mm.load("tiny-clip")
    model.wrapped.set_progress_bar_config(disable=True)
    parts = grid(model, heads=True, steps=step_groups(STEPS, 4))
    estimates: dict[str, list[Tensor]] = {}
    exact: dict[str, list[Tensor]] = {}
    sums: dict[str, list[tuple[float, float]]] = {}
    for case in sd_cases(n, split):
        ends = [model.run({**OPTIONS, "prompt": p, "seed": case.seed, "output_type": "pt"}).output.images
                for p in (case.prompt, case.other)]  # fmt: skip
        apart = ends[1] - ends[0]

        def along(images: Tensor, apart: Tensor = apart) -> Tensor:
            return (images * apart).flatten(1).sum(1) / apart.square().sum()

        for metric_name, metric in {
            "linear": along,
            "judge": clip_contrast(judge, case.prompt, case.other),
        }.items():
            true = patch_words(model, [case], metric, parts, options=OPTIONS)
            exact.setdefault(metric_name, []).append((true.changed - true.base)[:, 0])
            for name, settings in {
                "gradient": {"method": "gradient"},
                "integrated, 10": {"points": 10},
                "integrated, 20": {"points": 20},
            }.items():
                found = attribute_patching(model, [case], metric, options=OPTIONS, **settings)
                key = f"{metric_name}, {name}"
                estimates.setdefault(key, []).append(found.of(parts)[:, 0])
                total = float(found.effects.nansum())
                sums.setdefault(key, []).append((total, float(found.whole[0] - found.base[0])))
    lines: dict[str, dict[str, float]] = {}
    for key, some in estimates.items():
        true = torch.stack(exact[key.partition(",")[0]])
        off = [a / b for a, b in sums[key]]
        whole = sum(a for a, _ in sums[key]) / sum(b for _, b in sums[key])
        lines[key] = agreement(torch.stack(some), true, torch.tensor(whole))
        lines[key] |= {"completeness within 30 %": float(np.mean([abs(x - 1) <= 0.3 for x in off]))}
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sd", type=int, default=20)
    parser.add_argument("--llava", type=int, default=24)
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    given = parser.parse_args(argv)
    for model, lines in (
        ("tiny-llava", of_llava(given.llava, given.split) if given.llava else {}),
        ("tiny-sd", of_sd(given.sd, given.split) if given.sd else {}),
    ):
        for name, line in lines.items():
            print(
                f"{model:<11} {name:<24} {json.dumps({k: round(v, 3) for k, v in line.items()})}", flush=True
            )


if __name__ == "__main__":
    main()
