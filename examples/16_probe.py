"""Which layers of tiny-llava know an object's colour, shape, position and background, at which tokens?

Linear probes on the picture's tokens and on the last one, beside a control task and a copy with shuffled
weights.

python examples/16_probe.py --out probes.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

import mm_adapters as mm
from methods_multimodal.plots import probe_curve
from methods_multimodal.probing import probe
from mm_adapters.zoo import measures, world

QUESTION = "<image>\nquestion: what shape is the object? answer:"
VARIABLES = ("colour", "shape", "position", "background")


def main(argv: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny-llava")
    parser.add_argument("--images", type=int, default=120)
    parser.add_argument("--out", type=Path, default=Path("probes.png"))
    args = parser.parse_args(argv)

    model = mm.load(args.model)
    scenes = [world.scene(i, "validation", kind="one") for i in range(args.images)]
    pictures = measures.images_of(scenes)
    parts = [pictures[i : i + 40] for i in range(0, len(pictures), 40)]
    sheet = probe(
        model,
        [{"images": part, "text": [QUESTION] * len(part)} for part in parts],
        {name: [measures.value_of(scene, name) for scene in scenes] for name in VARIABLES},
        sites="language.blocks.*.hook_resid_post",
        roles=("image", "last"),
        types=[f"{scene.things[0].colour} {scene.things[0].shape}" for scene in scenes],
    )
    figure = Figure(figsize=(13, 7), layout="constrained")
    for ax, name in zip(figure.subplots(2, 2).flat, VARIABLES, strict=True):
        probe_curve(sheet, name, ax)
        for role in sheet.roles:
            layer = sheet.best_layer(name, role)
            values, (low, high) = sheet.curve(name, role)
            reach = f"{low[layer]:.0%} to {high[layer]:.0%}"
            print(f"{name} at {role}: {values[layer]:.0%} ({reach}), layer {layer}")
    figure.savefig(args.out, dpi=100)
    print(args.out)
    return args.out


if __name__ == "__main__":
    main()
