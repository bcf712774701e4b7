"""Which image patches does an answer come from?

python examples/05_which_patches.py --question "what colour is the circle?" --out patches.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import mm_adapters as mm
from methods_multimodal.report import vlm_report
from mm_adapters.zoo import sample_images


def main(argv: Sequence[str] | None = None) -> Path:
    samples = sample_images()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny-llava")
    parser.add_argument("--image", default=str(samples["red_circle_left_of_blue_square"]))
    parser.add_argument("--other", default=str(samples["blue_circle_left_of_red_square"]))
    parser.add_argument("--question", default="what colour is the circle?")
    parser.add_argument("--out", type=Path, default=Path("patches.png"))
    args = parser.parse_args(argv)

    report = vlm_report(mm.load(args.model), [args.image, args.other], args.question, model_name=args.model)
    report.write(args.out)
    print(*report.lines, sep="\n")
    print(args.out)
    return args.out


if __name__ == "__main__":
    main()
