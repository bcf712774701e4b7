"""What does each attention head look for, in words?

python examples/07_name_heads.py --images FOLDER --vocabulary words.txt --out heads.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

import mm_adapters as mm
from methods_multimodal.plots import head_table
from methods_multimodal.text_explanations.name_heads import name_heads
from methods_multimodal.text_explanations.vocabulary import vocabulary
from mm_adapters.inputs.images import image_files
from mm_adapters.zoo import world


def main(argv: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny-clip")
    parser.add_argument("--images", type=Path, help="a folder; without one, scenes of the zoo's world")
    parser.add_argument("--vocabulary", default="world")
    parser.add_argument("--out", type=Path, default=Path("named_heads.png"))
    args = parser.parse_args(argv)

    if args.images:
        pictures = [Image.open(p) for p in image_files(args.images)]
    else:
        scenes = [world.scene(i, "test", kind="one") for i in range(200)]
        pictures = [Image.fromarray(pixels) for pixels in world.render_batch(scenes)]
    model = mm.load(args.model)
    found = name_heads(model, pictures, vocabulary(args.vocabulary), n_texts=3, top=3)

    # The heads whose output varies most.
    n_heads = found.variance.shape[1]
    order = found.variance.flatten().argsort(descending=True)[:8].tolist()
    heads = [(i // n_heads, i % n_heads) for i in order]
    figure = Figure(figsize=(13, 9), layout="constrained")
    head_table(found, lambda i: pictures[i], figure.add_subplot(), heads=heads)
    figure.savefig(args.out, dpi=100)
    for layer, head in heads:
        print(f"head {layer}.{head}: {', '.join(found.names(layer, head))}")
    print(args.out)
    return args.out


if __name__ == "__main__":
    main()
