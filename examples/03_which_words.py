"""Where is each word of the prompt attended to?

python examples/03_which_words.py --prompt "a large red circle in the middle" --out words.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

import mm_adapters as mm
from methods_multimodal.cross_attention import word_maps
from methods_multimodal.diffusion import pictures_of, to_array
from methods_multimodal.plots import overlay, picture


def main(argv: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny-sd")
    parser.add_argument("--prompt", default="a large red circle in the middle on a white background")
    parser.add_argument("--word", action="append", help="a word or phrase of the prompt; all words without")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("words.png"))
    args = parser.parse_args(argv)

    model = mm.load(args.model)
    inputs = {
        "prompt": args.prompt,
        "num_inference_steps": args.steps,
        "seed": args.seed,
        "output_type": "pt",
    }
    maps, output = word_maps(model, inputs, words=args.word)
    pixels = to_array(pictures_of(model, output)[0].float())

    figure = Figure(figsize=(2.8 * (len(maps.words_of()) + 1), 3), layout="constrained")
    axes = figure.subplots(1, len(maps.words_of()) + 1)
    picture(pixels, axes[0], title=args.prompt if len(args.prompt) < 30 else "the picture")
    for ax, word, values in zip(axes[1:], maps.words_of(), maps.at()[0], strict=True):
        overlay(values, pixels, ax, unit="attention weight", title=f"attention to “{word}”", smooth=True)
    figure.savefig(args.out, dpi=110)
    print(args.out)
    return args.out


if __name__ == "__main__":
    main()
