"""What the layers of tiny-sd's text tower draw, judged by exact rules on pixels."""

from __future__ import annotations

from typing import Any

import torch

import mm_adapters as mm
from methods_multimodal import lenses
from methods_multimodal.core.statistics import bootstrap
from mm_adapters.zoo import measures
from tests.quality.prompts import ATTRIBUTES, one_object, seen

Row = tuple[str, str, str]
OPTIONS: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 3.0}


def diffusion(n: int) -> list[Row]:
    """The share of pictures that show what the prompt said, by layer and attribute."""
    model = mm.load("tiny-sd")
    model.wrapped.set_progress_bar_config(disable=True)
    cases = one_object(max(4, n // 4), "test")
    shown: list[list[Any]] = []
    for first in range(0, len(cases), 16):
        part = cases[first : first + 16]
        seeds = range(first, first + len(part))
        found = lenses.diffusion_lens(model, [text for _, text in part], list(seeds), options=OPTIONS)
        shown += [[seen(picture) for picture in of] for of in found.pictures]
    order = torch.randperm(len(cases), generator=torch.Generator().manual_seed(0)).tolist()
    rows = []
    for attribute in ATTRIBUTES:
        truth = [measures.value_of(scene, attribute) for scene, _ in cases]
        for layer, name in enumerate(found.layers):
            said = [getattr(of[layer], attribute) for of in shown]
            right, mixed = (
                bootstrap(torch.tensor([[float(a == t[i])] for i, a in enumerate(said)]))
                for t in (truth, [truth[j] for j in order])
            )
            value, null = (f"{x.mean:.2f} ({x.low:.2f} to {x.high:.2f})" for x in (right, mixed))
            rows.append((f"{attribute}, {name}", value, f"another prompt's truth {null}"))
    return rows
