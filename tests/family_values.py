"""What each tiny family is and computes: `python -m tests.family_values` writes it down.

For each family its towers' configurations, names and axes of its sites, the roles of its positions, and the
size of what passes each site outside the blocks and in the first of them, on seeded random weights. The
contract tests hold these against the libraries; this list notices when any of them moves.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import tiny
import torch
from torch import Tensor

import mm_adapters as mm

SHOWN = Path(__file__).with_name("family_values.json")
_TWO_STEPS = ("kandinsky_prior", "kandinsky_3", "kandinsky_combined", "unclip")


def size_of(value: Tensor) -> str:
    """A value's shape, the mean size of its finite numbers, their spread, and how many are not finite."""
    x = value.detach().double()
    finite = x[x.isfinite()]
    sizes = [finite.abs().mean(), finite.std()] if finite.numel() > 1 else [finite.sum()]
    others = int((~x.isfinite()).sum())
    told = [
        "x".join(map(str, x.shape)),
        *(f"{float(one):#.4g}" for one in sizes),
        *([str(others)] if others else []),
    ]
    return " ".join(told)


def settings_of(config: Any) -> dict[str, Any]:
    """The plain fields of a configuration that differ from what a class of it begins with."""
    held = {f.name: (getattr(config, f.name), f.default) for f in fields(config)}
    return {
        k: v for k, (v, default) in held.items() if isinstance(v, str | int | float | bool) and v != default
    }


def is_looked_at(site: Any) -> bool:
    """Whether a site lies outside the blocks, or in the first block of its stack."""
    parts = site.name.split(".")
    return not any(p.isdigit() and int(p) > 0 for p in parts)


def of_family(name: str) -> dict[str, Any]:
    """One family's description."""
    case = tiny.CASES[name]()
    model = mm.HookedModel(case.model)
    steps = {k: 2 if name in _TWO_STEPS else 1 for k in case.inputs if k.endswith("num_inference_steps")}
    inputs = case.inputs | steps
    sites = list(model.sitemap)
    every = hashlib.sha256("\n".join(sorted(f"{s.name} {s.axes}" for s in sites)).encode()).hexdigest()[:12]
    torch.manual_seed(0)  # Some pipelines draw from the global generator beside the one they are given.
    run = model.run(inputs, read=[s.name for s in sites if is_looked_at(s)])
    out = {
        "kind": model.kind,
        "towers": {t: settings_of(getattr(model, t).cfg) for t in model.towers if hasattr(model, t)},
        "sites": {"n": len(sites), "all": every},
        "values": {site: size_of(value) for site, value in run.values.items()},
        "roles": roles(model, inputs),
    }
    return json.loads(json.dumps(out, default=str))


def roles(model: mm.HookedModel, inputs: dict[str, Any]) -> Any:
    """How many positions of each role each tower has, its grid and where its first patches lie."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = model.layout(**inputs)
    except Exception as error:  # noqa: BLE001  What cannot be laid out says why, by its class.
        return type(error).__name__
    return {
        tower: {
            "roles": dict(Counter(role for row in layout.roles for role in row)),
            "grid": layout.grid,
            "patches": [place for place in layout.patches[0] if place is not None][:4]
            if layout.patches
            else None,
        }
        for tower, layout in found.items()
    }


def main() -> None:
    torch.set_num_threads(1)
    lines = (f"{json.dumps(name)}: {json.dumps(of_family(name))}" for name in tiny.CASES)
    SHOWN.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
