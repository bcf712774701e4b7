"""What changes when one word of the prompt is replaced, and what stays?

python examples/13_edit_words.py --prompt "a large red circle on a white background" --word red --other blue
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

import mm_adapters as mm
from methods_multimodal.cross_attention import WordEdit, edit_words
from methods_multimodal.diffusion import to_array
from methods_multimodal.plots import picture


def main(argv: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny-sd")
    parser.add_argument("--prompt", default="a large red circle in the middle on a white background")
    parser.add_argument("--word", default="red")
    parser.add_argument("--other", default="blue")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("edit.png"))
    args = parser.parse_args(argv)

    model = mm.load(args.model)
    changed = args.prompt.replace(args.word, args.other, 1)
    edits = [
        WordEdit(changed, None, own=0.0),
        WordEdit(changed, "replace", cross=0.8, own=0.4),
        WordEdit(changed, "replace", cross=0.4, own=0.2),
        WordEdit(args.prompt, None, own=0.0, weights={args.word: 0.0}),
        WordEdit(args.prompt, None, own=0.0, weights={args.word: 4.0}),
    ]
    images = edit_words(
        model, args.prompt, edits, n_steps=args.steps, seed=args.seed, options={"guidance_scale": 3.0}
    )
    titles = [
        "the picture",
        f"“{args.other}”, drawn freely",
        f"“{args.other}”, held for 80% of the steps",
        f"“{args.other}”, held for 40%",
        f"“{args.word}” turned off",
        f"“{args.word}” four times as strong",
    ]
    figure = Figure(figsize=(2.8 * len(titles), 3.3), layout="constrained")
    figure.suptitle(args.prompt, fontsize=11)
    for ax, image, title in zip(figure.subplots(1, len(titles)), images, titles, strict=True):
        picture(to_array(image), ax, title=title)
    figure.savefig(args.out, dpi=110)
    print(args.out)
    return args.out


if __name__ == "__main__":
    main()
