"""Which pixels speak for which of two texts?

python examples/08_text_to_pixels.py --image a.png --text "a red circle" --text "a square" --out pixels.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure

import mm_adapters as mm
from methods_multimodal.core.embed import embed_texts
from methods_multimodal.plots import picture, text_map
from methods_multimodal.report._page import as_seen
from methods_multimodal.text_explanations.segmentation import segment
from mm_adapters.zoo import sample_images


def main(argv: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny-clip")
    parser.add_argument("--image", default=str(sample_images()["red_circle_left_of_blue_square"]))
    parser.add_argument(
        "--text", action="append", help="twice or more: each is seen against the average of all"
    )
    parser.add_argument("--out", type=Path, default=Path("text_to_pixels.png"))
    args = parser.parse_args(argv)
    texts = args.text or ["a photo of a red circle", "a photo of a blue square"]

    model = mm.load(args.model)
    (pixels,) = model.prepare(images=[args.image]).values()
    chosen = torch.arange(len(texts))[None]
    found = segment(model, pixels, embed_texts(model, texts), chosen, shifts=2)

    seen = as_seen(model, pixels[0])
    figure = Figure(figsize=(4.2 * (len(texts) + 1), 4), layout="constrained")
    axes = figure.subplots(1, len(texts) + 1)
    picture(seen, axes[0], title="what the model saw")
    for i, text in enumerate(texts):
        text_map(found, seen, axes[1 + i], text=i, title=text)
    figure.savefig(args.out, dpi=100)
    print(args.out)
    return args.out


if __name__ == "__main__":
    main()
