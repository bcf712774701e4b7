"""Which variables can be read off which layers and roles of the zoo, beside every null.

python -m tests.quality.probing [--only tiny-clip-vision,tiny-clip-text,tiny-llava,tiny-sd-text,tiny-sd]
    [--n 400] [--draws 3]

A line is one variable at one role (and step): accuracy by layer; at the layer that validation rows chose the
accuracy on test rows, its selectivity (less the accuracy on a control task that a random label for each
(shape, colour), or pair of colours, makes), the accuracy on shuffled labels, that of an untrained twin at the
layer chosen for it, and the paired difference to it. Intervals are 95 %, by bootstrap over draws (new scenes,
new twin, new split) and test rows within. The last lines are of a variable that is in no input.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import mm_adapters as mm
from methods_multimodal.core.statistics import Estimate, bootstrap
from methods_multimodal.probing import ProbeSheet, probe
from tests.quality import probing_data as data

KINDS = ("one", "many", "two")


@dataclass(frozen=True)
class Part:
    """One tower of one model: what is run, and where it is read."""

    model: str
    inputs: data.Inputs
    sites: str
    roles: tuple[str, ...]
    steps: tuple[int, ...] | None = None
    kinds: tuple[str, ...] = KINDS


PARTS = {
    "tiny-clip-vision": Part(
        "tiny-clip", data.pictures, "vision.blocks.*.hook_resid_post", ("class", "patch")
    ),
    "tiny-clip-text": Part("tiny-clip", data.captions, "text.blocks.*.hook_resid_post", ("end", "word")),
    "tiny-llava": Part("tiny-llava", data.questions, "language.blocks.*.hook_resid_post", ("image", "last")),
    "tiny-sd-text": Part("tiny-sd", data.texts_of_prompts, "text.blocks.*.hook_resid_post", ("end", "word")),
    "tiny-sd": Part("tiny-sd", data.prompts, "denoiser.blocks.*.hook_resid_post", ("mean",), data.STEPS),
}


def sheets(part: Part, n: int, draws: int) -> dict[str, list[ProbeSheet]]:
    """For each kind of scene, a sheet of each draw."""
    model = mm.load(part.model)
    out: dict[str, list[ProbeSheet]] = {}
    for kind in part.kinds:
        for draw in range(draws):
            asked = data.asked(part.inputs, kind, n, draw)
            sheet = probe(
                model,
                asked.batches,
                asked.labels,
                sites=part.sites,
                roles=part.roles,
                steps=part.steps,
                types=asked.types,
                twin=data.untrained(part.model, draw + 1),
                seed=draw,
            )
            out.setdefault(kind, []).append(sheet)
    return out


def rows_of(sheets_of: dict[str, list[ProbeSheet]]) -> list[dict[str, Any]]:
    """A line for each variable, role and step."""
    rows = []
    for of_kind in sheets_of.values():
        first = of_kind[0]
        for variable in first.variables:
            for role in first.roles:
                for step in first.steps or (None,):
                    rows.append(_row(of_kind, variable, role, step))
    return rows


def _row(of_kind: Sequence[ProbeSheet], variable: str, role: str, step: int | None) -> dict[str, Any]:
    curves = torch.stack([sheet.curve(variable, role, step)[0] for sheet in of_kind]).mean(0)
    right = {kind: _chosen(of_kind, variable, role, step, kind) for kind in of_kind[0].kinds}
    v = of_kind[0].variables.index(variable)
    return {
        "variable": variable,
        "role": role,
        "step": step,
        "classes": len(of_kind[0].classes[v]),
        "guess": float(np.mean([float(sheet.guess[v]) for sheet in of_kind])),
        "by layer": curves.tolist(),
        "layers": [sheet.best_layer(variable, role, step) for sheet in of_kind],
        "task": bootstrap(right["task"], n_resamples=2000),
        "selectivity": bootstrap(right["task"], than=right["control"], n_resamples=2000),
        "shuffled": bootstrap(right["shuffled"], n_resamples=2000),
        "twin": bootstrap(right["twin"], n_resamples=2000),
        "above the twin": bootstrap(right["task"], than=right["twin"], n_resamples=2000),
    }


def _chosen(
    of_kind: Sequence[ProbeSheet], variable: str, role: str, step: int | None, kind: str
) -> torch.Tensor:
    """Whether each test row of each draw is right at the layer that its validation rows chose."""
    out = []
    for sheet in of_kind:
        layer = sheet.best_layer(variable, role, step, "twin" if kind == "twin" else "task")
        at = (sheet.variables.index(variable), layer, sheet.roles.index(role))
        right = sheet.right[sheet.kinds.index(kind)][at]
        out.append(right[0 if step is None else sheet.steps.index(step)].double())
    return torch.stack(out)


def nothing_covered(sheets_of: dict[str, list[ProbeSheet]]) -> dict[str, float]:
    """Of the intervals of the variable that is in no input, the share that covers chance; over all places."""
    covered, means = [], []
    for sheet in sheets_of.get("one", []):
        v = sheet.variables.index(data.NOTHING)
        low, high = sheet.interval()[:, v]
        chance = 1 / len(sheet.classes[v])
        covered.append(((low <= chance) & (chance <= high)).flatten())
        means.append(sheet.accuracy()[v].flatten())
    share = torch.cat(covered).double()
    return {"places": len(share), "covering": float(share.mean()), "accuracy": float(torch.cat(means).mean())}


def shown(of: Estimate, sign: str = "") -> str:
    """An estimate with its interval, in per cent."""
    mean, low, high = (format(100 * x, f"{sign}z.0f") for x in (of.mean, of.low, of.high))
    return f"{mean} [{low}, {high}]"


def table(name: str, rows: Sequence[dict[str, Any]]) -> str:
    """The lines as a table for a page, in per cent."""
    head = ("variable", "role", "guess", "by layer", "chosen layer", "accuracy", "selectivity", "shuffled",
            "untrained", "above untrained")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        role = row["role"] if row["step"] is None else f"{row['role']}, step {row['step']}"
        layers = sorted(set(row["layers"]))
        cells = [
            row["variable"],
            role,
            f"{100 * row['guess']:.0f}",
            " ".join(f"{100 * x:.0f}" for x in row["by layer"]),
            ", ".join(map(str, layers)),
            shown(row["task"]),
            shown(row["selectivity"], "+"),
            shown(row["shuffled"]),
            shown(row["twin"]),
            shown(row["above the twin"], "+"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return f"### {name}\n\n" + "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--n", type=int, default=400)
    parser.add_argument("--draws", type=int, default=3)
    args = parser.parse_args(argv)
    found = {}
    for name in args.only.split(","):
        began = time.monotonic()
        of_part = sheets(PARTS[name], args.n, args.draws)
        rows = rows_of(of_part)
        nothing = nothing_covered(of_part)
        found[name] = {"rows": rows, "nothing": nothing}
        print(table(f"{name} ({time.monotonic() - began:.0f} s)", rows), flush=True)
        print(
            f"\n{name}: of a variable in no input {nothing['covering']:.1%} of {nothing['places']} intervals "
            f"cover chance; mean accuracy {nothing['accuracy']:.1%}, chance 25 %.\n",
            flush=True,
        )
    return found


if __name__ == "__main__":
    main()
    sys.exit(0)
