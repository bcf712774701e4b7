"""At which layers and steps does tiny-sd read a word of colour, shape or background?

python examples/12_trace_words.py --cases 4 --steps 20 --out trace.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

import mm_adapters as mm
from methods_multimodal.cross_attention import Case, clip_contrast, grid, patch_words, step_groups
from methods_multimodal.plots import effect_grid

PROMPT = "a {size} {colour} {shape} in the {position} on a {background} background"
PLAIN = {"size": "large", "colour": "red", "shape": "circle", "position": "middle", "background": "white"}
CHANGES = {"colour": ("red", "blue"), "shape": ("circle", "square"), "background": ("white", "black")}
POSITIONS = ("middle", "left", "right", "top", "bottom")


def main(argv: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny-sd")
    parser.add_argument("--judge", default="tiny-clip")
    parser.add_argument("--cases", type=int, default=2, help="pictures for each attribute")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("trace.png"))
    args = parser.parse_args(argv)

    model, judge = mm.load(args.model), mm.load(args.judge)
    model.wrapped.set_progress_bar_config(disable=True)
    parts = grid(model, steps=step_groups(args.steps, 3))
    options = {"num_inference_steps": args.steps, "guidance_scale": 3.0}
    figure = Figure(figsize=(15, 6), layout="constrained")
    for ax, (name, (word, other)) in zip(figure.subplots(1, 3), CHANGES.items(), strict=True):
        cases = []
        for seed in range(args.cases):
            words = PLAIN | {"position": POSITIONS[seed % len(POSITIONS)]}
            new = PROMPT.format(**words | {name: other})
            cases.append(Case(PROMPT.format(**words), word, new, other, seed))
        # What the judge is asked says nothing else, so that only this attribute moves the number.
        plain = {
            "colour": "a {} object",
            "shape": "a {}",
            "background": "an object on a {} background",
        }[name]
        metric = clip_contrast(judge, plain.format(word), plain.format(other))
        effects = patch_words(model, cases, metric, parts, options=options, batch=2 + 2 * len(parts))
        share, control = effects.share(), effects.control_share()
        for i in share.mean.argsort(descending=True)[:3].tolist():
            print(
                f"{name} ({word} to {other}): patched at {parts[i]} {float(share.mean[i]):+z.2f} of it "
                f"({float(share.low[i]):+z.2f} to {float(share.high[i]):+z.2f}), "
                f"as far in a random direction {float(control.mean[i]):+z.2f}"
            )
        effect_grid(effects, ax, title=f"{name}: {word} to {other}")
    figure.savefig(args.out, dpi=110)
    print(args.out)
    return args.out


if __name__ == "__main__":
    main()
