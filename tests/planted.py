"""Units whose concept is known: neurons of tiny-clip replaced by ones that compute it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

import mm_adapters as mm
from mm_adapters.zoo import labels, measures, world

CONCEPTS = labels.CATEGORIES["shape"] + labels.CATEGORIES["colour"] + labels.CATEGORIES["background"]
LAYER = 3
SITE = f"vision.blocks.{LAYER}.mlp.hook_post"


def scenes(n: int, split: str = "test", seed: int = 5) -> list[world.Scene]:
    """Pictures of one object, solid."""
    return [world.scene(i, split, seed, kind="one", solid=True) for i in range(n)]


def batches(model: mm.HookedModel, some: Sequence[world.Scene], size: int = 64) -> list[dict[str, Any]]:
    """The scenes as the model's own inputs."""
    made = []
    for i in range(0, len(some), size):
        images = measures.images_of(some[i : i + size])
        made.append(model.prepare(text=["a"], images=images))
    return made


def plant(model: mm.HookedModel, concepts: Sequence[str], first_unit: int = 0) -> list[int]:
    """Makes the first neurons of the last MLP fire where each concept's pixels are; says which."""
    shown = scenes(400, "train", 9)
    mlp = model.wrapped.vision_model.encoder.layers[LAYER].mlp
    caught: list[torch.Tensor] = []
    handle = mlp.fc1.register_forward_hook(lambda module, args, out: caught.append(args[0].detach()))
    try:
        for batch in batches(model, shown):
            model.run(batch)
    finally:
        handle.remove()
    seen = torch.cat(caught)[:, 1:].flatten(0, 1).numpy()  # Without the class token.
    mean, spread = seen.mean(0), seen.std(0) + 1e-6
    units = list(range(first_unit, first_unit + len(concepts)))
    for unit, concept in zip(units, concepts, strict=True):
        covered = np.concatenate([_cells(one, concept) for one in shown])
        clear = (covered > 0.8) | (covered < 0.05)
        probe = LogisticRegression(C=0.1, max_iter=300).fit(
            (seen[clear] - mean) / spread, covered[clear] > 0.5
        )
        weight = probe.coef_[0] / spread
        with torch.no_grad():
            mlp.fc1.weight[unit] = torch.from_numpy(weight)
            mlp.fc1.bias[unit] = float(probe.intercept_[0] - weight @ mean)
    return units


def _cells(one: world.Scene, concept: str) -> np.ndarray:
    """How much of each of the 64 patches the concept covers."""
    mask = labels.masks_of(one).get(concept, np.zeros((64, 64), bool))
    return mask.reshape(8, 8, 8, 8).mean((1, 3)).ravel()
