"""Which attention heads make this image match this text rather than that one?

python examples/02_which_heads.py --text "a red circle" --text "a blue square" --out heads.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

import mm_adapters as mm
from methods_multimodal.lenses.direct_attribution import attribute_logits
from methods_multimodal.plots import head_shares, mlp_shares
from mm_adapters.zoo import sample_images


def main(argv: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny-clip")
    parser.add_argument("--image", default=str(sample_images()["red_circle"]))
    parser.add_argument("--text", action="append", help="twice: this one, rather than that one")
    parser.add_argument("--out", type=Path, default=Path("heads.png"))
    args = parser.parse_args(argv)
    texts = args.text or ["a red circle", "a blue square"]

    model = mm.load(args.model)
    shares = attribute_logits(model, {"text": texts, "images": [args.image]}, texts=texts)
    if len(texts) > 1:
        shares = shares.minus(0, 1)

    figure = Figure(figsize=(12, 5), layout="constrained")
    heads, parts = figure.subplots(1, 2)
    head_shares(shares, heads)
    mlp_shares(shares, parts)
    figure.savefig(args.out, dpi=110)
    total, own = float(shares.total[0, 0]), float(shares.logit[0, 0])
    print(f"{shares.texts[0]}: {total:+z.4f} = the model's own {own:+z.4f}")
    print(args.out)
    return args.out


if __name__ == "__main__":
    main()
