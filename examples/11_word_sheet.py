"""Where, and at which steps, is each word of the prompt attended to?

python examples/11_word_sheet.py --prompt "a large red circle in the middle" --word circle --out sheet.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import mm_adapters as mm
from methods_multimodal.report import words_report


def main(argv: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny-sd")
    parser.add_argument("--prompt", default="a large red circle in the middle on a white background")
    parser.add_argument("--word", action="append", help="a word or phrase of the prompt; all words without")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("word_sheet.png"))
    args = parser.parse_args(argv)

    report = words_report(
        mm.load(args.model),
        args.prompt,
        words=args.word,
        seed=args.seed,
        steps=args.steps,
        model_name=args.model,
    )
    report.figure.savefig(args.out, dpi=110)
    print("\n".join(report.lines))
    print(args.out)
    return args.out


if __name__ == "__main__":
    main()
