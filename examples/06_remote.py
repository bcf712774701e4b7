"""Which head matters most, and does it matter as much on another machine?

python examples/06_remote.py --out heads.png                                  # here
mm-interp ndif up                                                             # prints READY and an address
python examples/06_remote.py --remote http://127.0.0.1:18001 --out heads.png  # the same on a service
NDIF_API_KEY=... python examples/06_remote.py --model openai/clip-vit-base-patch32 --remote hosted \\
    --out heads.png                                                           # the same on the hosted one

Each head of one vision layer is ablated in turn; the bars are what the logit of the text loses. With
`--remote` they are computed twice, and the example ends with an error if the two disagree. On the hosted
service nothing is installed: this package's code travels with the job.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch

import mm_adapters as mm
from mm_adapters.zoo import sample_images


def losses(model: Any, inputs: dict[str, Any], layer: int, remote: bool | str) -> list[float]:
    """What ablating each head takes from the logit, in logits."""
    site = f"vision.blocks.{layer}.attn.hook_z"
    before = float(model.run(inputs, remote=remote).output.logits_per_image[0, 0])
    n_heads = model.run(inputs, read=[site], remote=remote)[site].shape[2]
    out = []
    for head in range(n_heads):

        def ablate(z: torch.Tensor, head: int = head) -> torch.Tensor:
            z = z.clone()
            z[:, :, head] = 0
            return z

        after = model.run(inputs, edit=[mm.Edit(site, ablate)], remote=remote).output
        out.append(before - float(after.logits_per_image[0, 0]))
    return out


def main(argv: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny-clip")
    parser.add_argument("--image", default=str(sample_images()["red_circle"]))
    parser.add_argument("--text", default="a red circle")
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument(
        "--remote", help='a service\'s address, or "hosted" for the one nnsight is configured for'
    )
    parser.add_argument("--out", type=Path, default=Path("heads.png"))
    args = parser.parse_args(argv)

    inputs = {"text": [args.text], "images": [args.image]}
    model = mm.load(args.model, engine="nnsight")
    found = {"here": losses(model, inputs, args.layer, False)}
    if args.remote:
        where = True if args.remote == "hosted" else args.remote
        found["remote"] = losses(model, inputs, args.layer, where)
        torch.testing.assert_close(
            torch.tensor(found["remote"]), torch.tensor(found["here"]), rtol=1e-4, atol=1e-4
        )

    figure, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
    width = 0.8 / len(found)
    for i, (name, values) in enumerate(found.items()):
        ax.bar([h + i * width for h in range(len(values))], values, width, label=name)
    ax.set_xticks([h + width * (len(found) - 1) / 2 for h in range(len(values))], range(len(values)))
    ax.axhline(0, color="0.4", linewidth=0.8)
    ax.set_xlabel(f"head of vision block {args.layer}")
    ax.set_ylabel("lost without it (logits)")
    ax.set_title(f'"{args.text}", {args.model}')
    ax.legend(frameon=False)
    figure.savefig(args.out, dpi=120)
    plt.close(figure)
    print(args.out)
    return args.out


if __name__ == "__main__":
    main()
