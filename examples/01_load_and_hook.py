"""How do I read and edit what happens inside a model of images and texts?

python examples/01_load_and_hook.py --out hooks.txt
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

import mm_adapters as mm
from mm_adapters.zoo import sample_images


def main(argv: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny-clip")
    parser.add_argument("--image", default=str(sample_images()["red_circle"]))
    parser.add_argument("--out", type=Path, default=Path("hooks.txt"))
    args = parser.parse_args(argv)

    model = mm.load(args.model)
    inputs = {"text": ["a red circle", "a blue square"], "images": [args.image]}
    lines = [str(model.sites("vision.blocks.0.attn.*"))]

    # Read: TransformerLens' ActivationCache.
    output, cache = model.run_with_cache(**inputs)
    lines.append(f"logits: {output.logits_per_image.tolist()}")
    lines.append(f"pattern of block 3: {tuple(cache['vision.blocks.3.attn.hook_pattern'].shape)}")

    # Edit: without head 1 of block 2.
    def ablate(z: torch.Tensor, hook) -> torch.Tensor:
        z[:, :, 1] = 0
        return z

    edited = model.run_with_hooks(**inputs, fwd_hooks=[("vision.blocks.2.attn.hook_z", ablate)])
    lines.append(f"logits without head 1 of block 2: {edited.logits_per_image.tolist()}")

    # One tower alone is a TransformerLens model.
    pixels = model.prepare(images=[args.image])["pixel_values"]
    _, seen = model.vision.run_with_cache(pixels)
    parts, labels = seen.decompose_resid(return_labels=True)
    lines.append(f"class token: {len(labels)} parts of the residual stream, lengths")
    lines += [f"  {n:>10} {float(x[0, 0].norm()):7.3f}" for n, x in zip(labels, parts, strict=True)]

    args.out.write_text("\n".join(lines) + "\n")
    print(args.out)
    return args.out


if __name__ == "__main__":
    main()
