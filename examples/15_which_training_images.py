"""Which training images made tiny-sd draw what it draws of a prompt?

D-TRAK on the model's own training set: gradients of the denoiser's output, projected, and their kernel.

python examples/15_which_training_images.py --prompt "a red circle" --out sources.png
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

import mm_adapters as mm
from methods_multimodal.data_attribution import (
    Projection,
    Trak,
    diffusion_examples,
    diffusion_task,
    featurise,
    query_features,
    scores,
)
from methods_multimodal.data_attribution.pictures import read_pictures
from methods_multimodal.plots.data_attribution import sources


def main(argv: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompt", default="a red circle")
    parser.add_argument("--images", type=int, default=48, help="how many of its training images")
    parser.add_argument("--out", type=Path, default=Path("sources.png"))
    args = parser.parse_args(argv)

    model = mm.load("tiny-sd")
    drawn = model.wrapped(
        args.prompt, num_inference_steps=20, generator=torch.Generator().manual_seed(0)
    ).images[0]
    known = read_pictures(f"zoo:{args.images}")
    examples = diffusion_examples(model, known.images(), list(known.captions))
    query = diffusion_examples(model, [drawn], [args.prompt])

    # What D-TRAK differentiates is the size of the denoiser's output, not its loss.
    task = diffusion_task(model, measure="output_norm", timesteps=4, noise="one")
    projection = Projection("sparse", 512)
    with tempfile.TemporaryDirectory() as folder:
        store = featurise(task, examples, folder, projection=projection)
        helped = scores(
            Trak(measure="output_norm"), store, query_features(task, query, projection=projection)
        )

    figure = sources(drawn, helped[0], known.image, title=args.prompt, captions=known.captions)
    figure.savefig(args.out, dpi=100)
    best = helped[0].argmax()
    print(f"helped most: number {int(best)}, {known.captions[best]!r}")
    print(args.out)
    return args.out


if __name__ == "__main__":
    main()
