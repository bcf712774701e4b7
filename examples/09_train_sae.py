"""Which concepts does a sparse autoencoder find in tiny-clip, and what does one latent look at?"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from sae_lens import BatchTopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig

import mm_adapters as mm
from integrations import sae_lens as mm_sae
from mm_adapters.zoo import world

SITE = "vision.blocks.2.hook_resid_post"


def main(argv: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny-clip")
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", type=Path, default=Path("sae_latent.png"))
    options = parser.parse_args(argv)
    model = mm.load(options.model)
    _, images = scenes_of(options.images, "train")

    cfg = BatchTopKTrainingSAEConfig(
        d_in=model.vision.cfg.d_model,
        d_sae=8 * model.vision.cfg.d_model,
        k=8,
        normalize_activations="covariance_whitening",
    )
    trainer = SAETrainerConfig(
        total_training_samples=options.steps * 512,
        train_batch_size_samples=512,
        lr=2e-3,
        lr_end=2e-4,
        n_batches_for_norm_estimate=20,
    )
    with tempfile.TemporaryDirectory() as folder:
        sae = mm_sae.train(
            model, SITE, cfg, data=images, tokens="patch", trainer=trainer, centre=True, folder=folder
        )
    scenes, images = scenes_of(320, "validation")
    print(mm_sae.evaluate(model, sae, images[:64]))

    # An image has a latent if any of its patches has; a latent is chosen on half of the images.
    acts = []
    for at in range(0, len(images), 32):
        _, cache = model.run_with_cache_with_saes(
            text=["."], images=images[at : at + 32], saes=[sae], names_filter=f"{SITE}.hook_sae_acts_post"
        )
        acts.append(cache[f"{SITE}.hook_sae_acts_post"][:, 1:].amax(1))
    truth = torch.tensor([[s.things[0].colour == colour for colour in world.COLOURS] for s in scenes])
    match = mm_sae.match_concepts(torch.cat(acts), truth, list(world.COLOURS))
    print(match)

    best = match.latent[match.f1.index(max(match.f1))]
    words = [f"a {colour} object" for colour in world.COLOURS]
    (found,) = mm_sae.top_images(model, sae, images, [best], words=words)
    mm_sae.gallery(found, images).savefig(options.out, dpi=120)
    print(options.out)
    return options.out


def scenes_of(n: int, split: str) -> tuple[list[world.Scene], list[Image.Image]]:
    """Scenes of one object, and what they look like."""
    scenes = [world.scene(i, split, seed=9, kind="one") for i in range(n)]
    return scenes, [Image.fromarray(picture) for picture in world.render_batch(scenes)]


if __name__ == "__main__":
    main()
