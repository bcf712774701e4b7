"""Which concept does each neuron of tiny-clip's last layer detect, and is that better than chance?

Network dissection and CLIP-Dissect on pictures of a world whose truth is known, checked on held-out ones.

python examples/14_dissect.py --out neurons.png
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

import mm_adapters as mm
from methods_multimodal.dissection import Concepts, Units
from methods_multimodal.dissection.survey import survey
from methods_multimodal.plots.dissection import detectors
from mm_adapters.zoo import labels, measures, world


def main(argv: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny-clip")
    parser.add_argument("--site", default="vision.blocks.3.mlp.hook_post")
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--out", type=Path, default=Path("neurons.png"))
    args = parser.parse_args(argv)

    model = mm.load(args.model)
    scenes = [world.scene(i, "validation", kind="one") for i in range(args.images)]
    pictures = measures.images_of(scenes)
    parts = [pictures[i : i + 32] for i in range(0, len(pictures), 32)]
    concepts = Concepts(labels.NAMES, labels.MEMBER_OF)
    with tempfile.TemporaryDirectory() as folder:
        found = survey(
            Units(model, args.site),
            [({"text": ["a"], "images": part}, part) for part in parts],
            model,
            concepts,
            folder,
            masks=[labels.masks_of(scene) for scene in scenes],
            texts=[labels.caption_of(name) for name in concepts.names],
        )

    figure = Figure(figsize=(12, 4 * len(found.methods)), layout="constrained")
    for ax, one in zip(figure.subplots(len(found.methods)), found.methods, strict=True):
        kept = one.chance.significant()
        assert one.faithful is not None
        own, same = float(one.faithful.auroc[kept].mean()), float(one.faithful.constant[kept].mean())
        line = f"{one.method}: {len(kept)} of {len(one.names)} units better than chance"
        line += f"; held-out AUROC {own:.2f}, one name for all ({one.faithful.constant_name}) {same:.2f}"
        print(line)
        detectors(one.names, kept, concepts, ax, title=line)
    figure.savefig(args.out, dpi=100)
    print(args.out)
    return args.out


if __name__ == "__main__":
    main()
