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
    parser.add_argument("--images", type=int, default=160)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--out", type=Path, default=Path("sae_latent.png"))
    options = parser.parse_args(argv)
    model = mm.load(options.model)
    scenes = [world.scene(i, "train", seed=9, kind="one") for i in range(options.images)]
    images = [Image.fromarray(picture) for picture in world.render_batch(scenes)]

    cfg = BatchTopKTrainingSAEConfig(
        d_in=model.vision.cfg.d_model,
        d_sae=8 * model.vision.cfg.d_model,
        k=16,
        normalize_activations="expected_average_only_in",
    )
    trainer = SAETrainerConfig(
        total_training_samples=options.steps * 512,
        train_batch_size_samples=512,
        lr=2e-3,
        lr_end=2e-4,
        n_batches_for_norm_estimate=5,
    )
    with tempfile.TemporaryDirectory() as folder:
        sae = mm_sae.train(
            model, SITE, cfg, data=images, tokens="patch", trainer=trainer, folder=folder, progress=False
        )
    print(mm_sae.evaluate(sae, model, images[:32]))

    red = torch.tensor([s.things[0].colour == "red" for s in scenes])
    acts = []
    for at in range(0, len(images), 32):
        _, cache = model.run_with_cache_with_saes(
            text=["."], images=images[at : at + 32], saes=[sae], names_filter=f"{SITE}.hook_sae_acts_post"
        )
        acts.append(cache[f"{SITE}.hook_sae_acts_post"][:, 1:].amax(1))
    match = mm_sae.match_concepts(torch.cat(acts), red[:, None], ["red"])
    print(match)

    words = [f"a {colour} object" for colour in world.COLOURS]
    (found,) = mm_sae.top_images(sae, model, images, [match.latent[0]], words=words)
    mm_sae.gallery(found, images).savefig(options.out, dpi=120)
    print(options.out)
    return options.out


if __name__ == "__main__":
    main()
