"""Which heads and MLPs of an image tower carry the colour of an object?

python examples/19_which_circuit.py --model tiny-clip --shape circle --out circuit.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import mm_adapters as mm
from methods_multimodal.circuits import Pairs
from methods_multimodal.report.circuit import circuit_report
from mm_adapters.zoo import measures, world


def colour_pairs(model: Any, shape: str) -> list[Pairs]:
    """Four images of one object, each beside the same in another colour; the texts say both colours."""
    pairs = []
    for number, (colour, other) in enumerate(
        (("red", "blue"), ("green", "red"), ("blue", "pink"), ("cyan", "red"))
    ):
        place = world.POSITIONS[2 * number]
        scenes = [world.by_hand("white", world.thing(shape, c, position=place)) for c in (colour, other)]
        texts = [f"a {colour} {shape}", f"a {other} {shape}"]
        clean, corrupted = (model.prepare(text=texts, images=measures.images_of([s])) for s in scenes)

        def metric(output: Any) -> torch.Tensor:
            return output.logits_per_image[:, 0] - output.logits_per_image[:, 1]

        pairs.append(Pairs(clean, corrupted, metric))
    return pairs


def main(argv: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny-clip")
    parser.add_argument("--shape", default="circle")
    parser.add_argument("--out", type=Path, default=Path("circuit.png"))
    args = parser.parse_args(argv)

    model = mm.load(args.model)
    report = circuit_report(model, colour_pairs(model, args.shape), model_name=args.model)
    report.write(args.out)
    print(*report.lines, sep="\n")
    print(args.out)
    return args.out


if __name__ == "__main__":
    main()
