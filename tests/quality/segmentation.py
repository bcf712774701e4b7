"""Zero-shot segmentation on tiny-clip, beside what attention alone and Grad-CAM show, in one table.

python -m tests.quality.segmentation [--model tiny-clip] [--images 100] [--draws 5]

Each row's threshold is chosen on scenes of the split "validation" and judged on "test", anew for each draw
of both; intervals are of the mean over draws. What a row is worth is told by those that know less: nothing
marked, a blob in the middle, the text of the picture's other object, and the same method on random weights;
and by one that knows more: pixels whose colour is the one that the text says.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
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

    def __init__(self, model: mm.HookedModel, split: str, kind: str, n: int, seed: int = 0) -> None:
        self.model = model
        scenes = [world.scene(i, split, seed=seed, kind=kind) for i in range(n)]
        self.images = torch.tensor(world.render_batch(scenes))
        self.pixels = model.prepare(images=images_of(scenes))["pixel_values"]
        self.asked = torch.tensor([[NAMES.index((t.shape, t.colour)) for t in s.things] for s in scenes])
        self.truth = torch.tensor(np.concatenate([world.masks(s) for s in scenes]))

    def with_texts(self, asked: Tensor) -> Scenes:
        """The same images and masks, asked for by other texts."""
        other = copy.copy(self)
        other.asked = asked
        return other

    def seen_by(self, model: mm.HookedModel) -> Scenes:
        """The same, for another model of the same input."""
        other = copy.copy(self)
        other.model = model
        return other

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


def nothing(scenes: Scenes) -> Tensor:
    """No pixel is marked."""
    return torch.zeros(scenes.truth.shape)


def middle(scenes: Scenes) -> Tensor:
    """Pixels near the middle of the picture."""
    along = torch.linspace(-1, 1, scenes.truth.shape[-1])
    return (-(along[:, None].square() + along.square())).exp().expand(scenes.truth.shape)


def colour(scenes: Scenes) -> Tensor:
    """Pixels whose colour is near the one that the text says: told what no map is."""
    named = [world.COLOURS[NAMES[i][1]] for i in scenes.asked.flatten().tolist()]
    images = scenes.images.repeat_interleave(scenes.per_image, 0).float()
    return (-(images - torch.tensor(named).float()[:, None, None]).norm(dim=-1) / 100).exp()


def other_text(scenes: Scenes) -> Tensor:
    """Contributions to the text of another object: of the same picture, or, of one alone, of the next."""
    turned = scenes.asked.flip(1) if scenes.per_image > 1 else scenes.asked.roll(1, 0)
    return contributions(1)(scenes.with_texts(turned))


def random_weights(scenes: Scenes) -> Tensor:
    """Contributions in a model of the same architecture that learned nothing."""
    torch.manual_seed(int(scenes.asked.sum()))
    made = type(scenes.model.wrapped)(copy.deepcopy(scenes.model.wrapped.config)).eval()
    return contributions(1)(scenes.seen_by(mm.HookedModel(made, inputs=scenes.model.inputs)))


METHODS: dict[str, Callable[[Scenes], Tensor]] = {
    "contributions of patches": contributions(1),
    "contributions, 2 x 2 shifts": contributions(2),
    "raw attention": raw_attention,
    "attention rollout": rollout,
    "Grad-CAM": grad_cam,
    "null: the other object's text": other_text,
    "null: random weights": random_weights,
    "null: the middle": middle,
    "null: nothing marked": nothing,
    "told more: the colour's pixels": colour,
}


@dataclass(frozen=True)
class Row:
    """A method's scores, one a draw of scenes."""

    name: str
    scores: tuple[SegmentationScores, ...]

    def of(self, what: str) -> np.ndarray:
        """One of the scores, [draw]."""
        return np.array([getattr(s, what) for s in self.scores])

    def line(self, first: Row) -> str:
        """As a row of the table; the last cell is how much the first row has more, draw by draw."""
        cells = [interval(self.of(what)) for what in ("foreground_iou", "average_precision", "mean_iou")]
        more = interval(first.of("foreground_iou") - self.of("foreground_iou")) if self is not first else ""
        return f"| {self.name} | {' | '.join(cells)} | {more} |"


def interval(values: np.ndarray) -> str:
    """The mean over draws and the half width of its 95 % interval."""
    if len(values) < 2:
        return f"{values.mean():.3f}"
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return f"{values.mean():.3f} ± {half:.3f}"


def table(
    kind: str,
    n: int,
    methods: dict[str, Callable[[Scenes], Tensor]] = METHODS,
    *,
    draws: int = 1,
    model: mm.HookedModel | None = None,
) -> dict[str, Row]:
    """Each method's scores on held-out images, its threshold chosen on other images."""
    model = model or mm.load("tiny-clip")
    found: dict[str, list[SegmentationScores]] = {name: [] for name in methods}
    for seed in range(draws):
        tuning, test = (Scenes(model, split, kind, n, seed) for split in ("validation", "test"))
        for name, maps in methods.items():
            threshold = float("inf") if maps is nothing else best_threshold(maps(tuning), tuning.truth)
            found[name].append(segmentation_scores(maps(test), test.truth, threshold))
    return {name: Row(name, tuple(scores)) for name, scores in found.items()}


def main(argv: list[str] | None = None) -> int:
    """Prints the two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="tiny-clip")
    parser.add_argument("--images", type=int, default=100, help="of each split and draw")
    parser.add_argument("--draws", type=int, default=5)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    model = mm.load(options.model)
    for kind in ("two", "one"):
        print(f"\n{kind} object{'s' if kind == 'two' else ''} in an image, {options.images} images a draw\n")
        print("| | object IoU | AP | mIoU | object IoU less than the first by |\n|---|---|---|---|---|")
        rows = list(table(kind, options.images, draws=options.draws, model=model).values())
        for row in rows:
            print(row.line(rows[0]), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
