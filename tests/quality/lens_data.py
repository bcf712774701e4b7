"""Questions and scenes that the tables on lenses are measured on, and where their objects lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mm_adapters.zoo import measures, questions, world

SIZE = 32


@dataclass(frozen=True)
class Asked:
    """Batches of tiny-llava's arguments, and the first token of each right answer."""

    batches: list[dict[str, Any]]
    answers: Tensor


def asked(model: Any, n: int, split: str, seed: int = 0, *, swapped: bool = False) -> Asked:
    """Questions of all kinds; `swapped`: each with another's image."""
    pairs = [questions.question(i, split, seed) for i in range(n)]
    pictures = measures.images_of([scene for scene, _ in pairs])
    pictures = pictures[1:] + pictures[:1] if swapped else pictures
    texts = [q.prompt() for _, q in pairs]
    return Asked(prepared(model, texts, pictures), first_tokens(model, [q.answer for _, q in pairs]))


def prepared(model: Any, texts: Sequence[str], pictures: Sequence[Any]) -> list[dict[str, Any]]:
    """The model's arguments, batch by batch."""
    parts = range(0, len(texts), SIZE)
    return [
        model.prepare(text=list(texts[i : i + SIZE]), images=[[p] for p in pictures[i : i + SIZE]])
        for i in parts
    ]


def first_tokens(model: Any, words: Sequence[str]) -> Tensor:
    """The first token of each word, as an answer begins."""
    tokenizer = model.tokenizer_of("language")
    return torch.tensor([tokenizer(f" {w}", add_special_tokens=False).input_ids[0] for w in words])


def two_shapes(n: int, split: str, seed: int = 0) -> list[world.Scene]:
    """Scenes of two objects of different shapes and colours."""
    scenes: list[world.Scene] = []
    index = 0
    while len(scenes) < n:
        scene = world.scene(index, split, seed, kind="two")
        index += 1
        a, b = scene.things
        if a.shape != b.shape and a.colour != b.colour:
            scenes.append(scene)
    return scenes


def patch_box(mask: np.ndarray, patch_px: int = 8) -> tuple[int, int, int, int]:
    """The patches (top, left, bottom, right) that hold a mask's bounding box."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, bottom, left, right = rows[0], rows[-1], columns[0], columns[-1]
    return (
        int(top // patch_px),
        int(left // patch_px),
        int(bottom // patch_px) + 1,
        int(right // patch_px) + 1,
    )


def covered(mask: np.ndarray, patch_px: int = 8) -> Tensor:
    """The share of each patch that a mask covers, [down, across]."""
    n = mask.shape[0] // patch_px
    return torch.from_numpy(mask.reshape(n, patch_px, n, patch_px).mean((1, 3))).float()
