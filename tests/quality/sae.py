"""What SAEs find in the zoo, measured on held-out scenes.

python -m tests.quality.sae clip  [--steps 1500] [--images 16000] [--k 8] [--site ...]
python -m tests.quality.sae clamp [--steps 600] [--prompts 60]

clip: a BatchTopK SAE, 8x wide, on tiny-clip's class token: variance explained, and for each attribute
value of the world the latent that detects it best (F1 on scenes the latent was not chosen on).
clamp: an SAE on a site of tiny-sd's denoiser; the latent of each colour is clamped while a picture of
another colour is drawn: how often the colour follows and the shape stays, by rules on pixels.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sae_lens import BatchTopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig

import mm_adapters as mm
from integrations import sae_lens as mm_sae
from mm_adapters.zoo import captions, judges, world

CLIP_SITE = "vision.blocks.3.hook_resid_post"
SD_SITE = "denoiser.blocks.2.hook_resid_post"


def truth_of(scenes: list[world.Scene]) -> tuple[torch.Tensor, list[str]]:
    """Which attribute values each scene shows, [scene, value], and their names."""
    columns, names = [], []
    for attribute, values in [*captions.VALUES.items(), ("background", tuple(world.BACKGROUNDS))]:
        for value in values:
            names.append(f"{attribute} {value}")
            columns.append(
                [
                    s.background == value
                    if attribute == "background"
                    else any(getattr(t, attribute) == value for t in s.things)
                    for s in scenes
                ]
            )
    return torch.tensor(columns).T, names


def trainer(steps: int, batch: int) -> SAETrainerConfig:
    return SAETrainerConfig(
        total_training_samples=steps * batch, train_batch_size_samples=batch, lr=2e-3, lr_end=2e-4,
        lr_warm_up_steps=50, lr_decay_steps=steps // 4, dead_feature_window=200,
        n_batches_for_norm_estimate=20,
    )  # fmt: skip


def images_of(scenes: list[world.Scene]) -> list[Image.Image]:
    return [
        Image.fromarray(p)
        for i in range(0, len(scenes), 500)
        for p in world.render_batch(scenes[i : i + 500])
    ]


def clip(n_images: int, steps: int, k: int, site: str, folder: Path) -> dict[str, Any]:
    """Explained variance on held-out images, and the match of latents with the world's attributes."""
    model = mm.load("tiny-clip")
    train = [world.scene(i, "train", seed=5, kind="one") for i in range(n_images)]
    test = [world.scene(i, "test", seed=5, kind="one") for i in range(2000)]
    cfg = BatchTopKTrainingSAEConfig(
        d_in=128, d_sae=1024, k=k, normalize_activations="expected_average_only_in"
    )
    sae = mm_sae.train(
        model, site, cfg, data=images_of(train), tokens="class", trainer=trainer(steps, 512),
        folder=folder / "sae", batch_size=100,
    )  # fmt: skip
    store = mm_sae.collect(model, site, images_of(test), folder / "test", tokens="class", batch_size=100)
    x = store.rows()[site]
    with torch.no_grad():
        acts = sae.encode(x)
        left = (x - sae.decode(acts)).square().sum() / (x - x.mean(0)).square().sum()
    truth, names = truth_of(test)
    return {"explained": 1 - float(left), "match": mm_sae.match_concepts(acts, truth, names)}


def prompts(n: int, split: str) -> tuple[list[world.Scene], list[str]]:
    scenes = [world.scene(i, split, seed=7, kind="one", solid=True, size="large") for i in range(n)]
    names = ("size", "colour", "shape", "position")
    claims = [
        captions.Claim((captions.phrase_of(s.things[0], names),), None, None, s.background) for s in scenes
    ]
    return scenes, [claim.text() for claim in claims]


def clamp(
    n_train: int, n_test: int, steps: int, site: str, n_steps: int, strength: float, folder: Path
) -> dict[str, float]:
    """How often the colour follows a clamped latent, and the shape stays."""
    model = mm.load("tiny-sd")
    model.wrapped.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": n_steps, "guidance_scale": 3.0}
    scenes, texts = prompts(n_train, "train")
    store = mm_sae.collect(model, site, texts, folder / "rows", inputs=options, batch_size=25)
    d_in = store.columns[site].shape[0]
    cfg = BatchTopKTrainingSAEConfig(
        d_in=d_in, d_sae=8 * d_in, k=16, normalize_activations="expected_average_only_in"
    )
    sae = mm_sae.train(model, site, cfg, data=store, trainer=trainer(steps, 1024), folder=folder / "sae")
    # Each prompt's mean latents; a colour's latent is active for it and not for the others.
    total = torch.zeros(n_train, 8 * d_in)
    count = torch.zeros(n_train, 1)
    for rows in store.batches(4096, seed=None):
        with torch.no_grad():
            acts = sae.encode(rows[site])
        total.index_add_(0, rows["item"].long(), acts)
        count.index_add_(0, rows["item"].long(), torch.ones(len(acts), 1))
    mean = total / count
    colours = list(world.COLOURS)
    code = torch.tensor([colours.index(s.things[0].colour) for s in scenes])
    chosen, level = {}, {}
    for i, colour in enumerate(colours):
        own, other = mean[code == i].mean(0), mean[code != i].mean(0)
        latent = int((own - 2 * other).argmax())
        chosen[colour] = latent
        level[colour] = float(mean[code == i][:, latent].mean())
    tests, asked = prompts(n_test, "test")
    wanted = [colours[(colours.index(s.things[0].colour) + 1 + i % 7) % 8] for i, s in enumerate(tests)]
    followed = stayed = 0
    for i, (scene, text, colour) in enumerate(zip(tests, asked, wanted, strict=True)):
        own = scene.things[0].colour
        edits = _moved(model, sae, chosen[own], chosen[colour], strength * level[colour])
        run = model.run({"prompt": [text], "seed": [i], **options}, edit=edits)
        seen = judges.judge(np.asarray(run.output.images[0]))
        followed += seen.colour == colour
        stayed += seen.shape == scene.things[0].shape
    return {"colour follows": followed / n_test, "shape stays": stayed / n_test}


def _moved(model: Any, sae: Any, off: int, on: int, value: float) -> list[mm.Edit]:
    """Clamps one colour's latent where the other's is active, and switches that off."""

    def change(acts: torch.Tensor) -> torch.Tensor:
        new = acts.clone()
        where = acts[..., off] > 0
        new[..., off] = 0
        new[..., on] = torch.where(where, torch.as_tensor(value), acts[..., on])
        return new

    return mm_sae.splice(model, sae, change=change, use_error_term=True, rows="cond")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("clip", "clamp"))
    parser.add_argument("--images", type=int, default=16_000)
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--train-prompts", type=int, default=200)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--sampling-steps", type=int, default=12)
    parser.add_argument("--strength", type=float, default=4.0)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--site")
    parser.add_argument("--folder", type=Path, help="keeps activations and checkpoints, to go on with")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        folder = options.folder or Path(made)
        if options.what == "clip":
            found = clip(options.images, options.steps, options.k, options.site or CLIP_SITE, folder)
            print(found["match"])
            share = found["match"].share()
            print(f"explained {found['explained']:.1%} (>= 90 %), F1 >= 0.9 for {share:.1%} (>= 80 %)")
            return int(found["explained"] < 0.9 or share < 0.8)
        rates = clamp(
            options.train_prompts, options.prompts, options.steps, options.site or SD_SITE,
            options.sampling_steps, options.strength, folder,
        )  # fmt: skip
    for name, value in rates.items():
        print(f"{name:<16} {value:.1%}")
    return int(rates["colour follows"] < 0.7 or rates["shape stays"] < 0.8)


if __name__ == "__main__":
    sys.exit(main())
