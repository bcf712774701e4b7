"""Which tokens carry the colour of the object asked about, and through which layers?

python examples/17_trace_answer.py --out trace.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

import mm_adapters as mm
from methods_multimodal.patching import answer_logits, information_flow, other_pictures, token_roles, trace
from methods_multimodal.plots import flow_lines, trace_grid
from mm_adapters.zoo import measures, world


def main(argv: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny-llava")
    parser.add_argument("--scenes", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("trace.png"))
    args = parser.parse_args(argv)

    # Scenes of two objects of unlike shape, each with a twin in which the first has another colour.
    scenes, twins = [], []
    index = 0
    while len(scenes) < args.scenes:
        scene = world.scene(index, "test", kind="two")
        index += 1
        first, second = scene.things
        colour = next(c for c in world.COLOURS if c not in (first.colour, second.colour))
        if first.shape != second.shape and (first.shape, colour) not in world.HELD_OUT_PAIRS:
            recoloured = replace(first, colour=colour, rgb=world.COLOURS[colour])
            scenes.append(scene)
            twins.append(replace(scene, things=(recoloured, second)))

    model = mm.load(args.model)
    text = [f"<image>\nquestion: what colour is the {s.things[0].shape}? answer:" for s in scenes]
    clean = {"text": text, "images": measures.images_of(scenes)}
    corrupted = {"text": text, "images": measures.images_of(twins)}
    tokens = model.tokenizer_of("language")
    right, wrong = (
        [tokens(f" {s.things[0].colour}", add_special_tokens=False).input_ids[0] for s in some]
        for some in (scenes, twins)
    )
    metric = answer_logits(model, clean, right, wrong)
    objects = torch.from_numpy(np.array([world.masks(scene)[0] for scene in scenes]))
    roles = token_roles(model, clean, objects=objects)
    masks = {name: roles[name] for name in ("object", "buffer", "background", "question", "last")}

    found = trace(model, clean, other_pictures(model, clean, corrupted), metric, masks)
    flow = information_flow(model, clean, metric, roles=roles)

    figure = Figure(figsize=(13, 4.5), layout="constrained")
    left, right_axes = figure.subplots(1, 2)
    trace_grid(found, left)
    flow_lines(flow, right_axes, unit="logit of the right colour less its twin's")
    figure.savefig(args.out, dpi=100)

    share = found.share()
    for window, row in zip(found.windows, share.mean.tolist(), strict=True):
        best = max(range(len(row)), key=row.__getitem__)
        print(f"before layer {window[0]}: {found.roles[best]}, {row[best]:.0%} of the difference")
    print(args.out)
    return args.out


if __name__ == "__main__":
    main()
