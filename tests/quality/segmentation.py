"""Zero-shot segmentation on tiny-clip, beside what attention alone and Grad-CAM show, in one table.

python -m tests.quality.segmentation [--images 200]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import mm_adapters as mm
from methods_multimodal.core.embed import embed_texts
from methods_multimodal.text_explanations.segmentation import (
    SegmentationScores,
    best_threshold,
    segment,
    segmentation_scores,
)
from mm_adapters.zoo import world
from mm_adapters.zoo.captions import Claim, Phrase
from mm_adapters.zoo.measures import images_of

NAMES = [(shape, colour) for shape in world.SHAPES for colour in world.COLOURS]
TEXTS = [Claim((Phrase(shape=s, colour=c),)).text("a photo of ") for s, c in NAMES]


class Scenes:
    """Images of some objects each; every object is asked for by its own text."""

    def __init__(self, model: mm.HookedModel, split: str, kind: str, n: int) -> None:
        self.model = model
        scenes = [world.scene(i, split, kind=kind) for i in range(n)]
        self.pixels = model.prepare(images=images_of(scenes))["pixel_values"]
        self.asked = torch.tensor([[NAMES.index((t.shape, t.colour)) for t in s.things] for s in scenes])
        self.truth = torch.tensor(np.concatenate([world.masks(s) for s in scenes]))

    @property
    def per_image(self) -> int:
        return self.asked.shape[1]


def contributions(shifts: int) -> Callable[[Scenes], Tensor]:
    def maps(scenes: Scenes) -> Tensor:
        texts = embed_texts(scenes.model, TEXTS)
        found = segment(scenes.model, scenes.pixels, texts, scenes.asked, shifts=shifts, batch_size=50)
        return found.maps.flatten(0, 1)

    return maps


def patterns(scenes: Scenes) -> Tensor:
    sites = [f"vision.blocks.{i}.attn.hook_pattern" for i in range(4)]
    run = scenes.model.run(
        {"pixel_values": scenes.pixels}, read=[mm.Read(s, lambda p: p.mean(1)) for s in sites]
    )
    return torch.stack([run[s] for s in sites])


def stretched(rows: Tensor, scenes: Scenes) -> Tensor:
    """The class token's row over patches, the same map for every object of an image."""
    grid = rows[:, 1:].reshape(-1, 1, 8, 8)
    up = F.interpolate(grid, size=scenes.pixels.shape[-2:], mode="bilinear", align_corners=False)
    return up[:, 0].repeat_interleave(scenes.per_image, 0)


def raw_attention(scenes: Scenes) -> Tensor:
    return stretched(patterns(scenes)[-1][:, 0], scenes)


def rollout(scenes: Scenes) -> Tensor:
    """Abnar & Zuidema 2020: the product over layers of attention with the residual added."""
    together: Any = None
    for layer in patterns(scenes):
        mixed = layer + torch.eye(layer.shape[-1])
        mixed = mixed / mixed.sum(-1, keepdim=True)
        together = mixed if together is None else mixed @ together
    return stretched(together[:, 0], scenes)


def grad_cam(scenes: Scenes) -> Tensor:
    """pytorch-grad-cam on the last block's input norm, the text's cosine as its target."""
    from pytorch_grad_cam import GradCAM

    class Image(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.clip = scenes.model.wrapped

        def forward(self, pixels: Tensor) -> Tensor:
            return F.normalize(self.clip.get_image_features(pixels).pooler_output, dim=-1)

    texts = embed_texts(scenes.model, TEXTS)
    texts = texts - texts.mean(0)
    layer = scenes.model.wrapped.vision_model.encoder.layers[-1].layer_norm1
    folded = lambda x: x[:, 1:].mT.reshape(len(x), -1, 8, 8)  # noqa: E731
    with GradCAM(Image(), [layer], reshape_transform=folded) as cam, torch.enable_grad():
        pixels = scenes.pixels.repeat_interleave(scenes.per_image, 0)
        targets = [lambda out, t=texts[i]: out @ t for i in scenes.asked.flatten().tolist()]
        maps = [
            cam(input_tensor=p, targets=targets[k * 50 : k * 50 + 50]) for k, p in enumerate(pixels.split(50))
        ]
    return torch.tensor(np.concatenate(maps))


METHODS: dict[str, Callable[[Scenes], Tensor]] = {
    "contributions of patches": contributions(1),
    "contributions, 2 x 2 shifts": contributions(2),
    "raw attention": raw_attention,
    "attention rollout": rollout,
    "Grad-CAM": grad_cam,
}


def table(
    kind: str, n: int, methods: dict[str, Callable[[Scenes], Tensor]] = METHODS
) -> dict[str, SegmentationScores]:
    """Each method's scores on held-out images, its threshold chosen on other images."""
    model = mm.load("tiny-clip")
    tuning, test = (Scenes(model, split, kind, n) for split in ("validation", "test"))
    found = {}
    for name, maps in methods.items():
        threshold = best_threshold(maps(tuning), tuning.truth)
        found[name] = segmentation_scores(maps(test), test.truth, threshold)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    for kind in ("two", "one"):
        print(f"{kind} object{'s' if kind == 'two' else ''} in an image, {options.images} images")
        for name, s in table(kind, options.images).items():
            print(
                f"  {name:<28} mIoU {s.mean_iou:.3f}  object {s.foreground_iou:.3f}  "
                f"pixels {s.pixel_accuracy:.3f}  AP {s.average_precision:.3f}"
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
