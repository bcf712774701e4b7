"""Libraries that researchers use beside this package: the same numbers as on the model inside.

Each comparison's other side is the library itself on the wrapped torch module.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mm_adapters as mm
from mm_adapters.zoo import sample_images


def needs(name: str) -> Any:
    """A module, without which its tests are skipped; in CI it must be there.

    quantus asks for a second build of OpenCV: `.ci/neighbours` puts it in front of the test environment.
    """
    is_here = os.environ.get("CI") and name != "quantus"
    return importlib.import_module(name) if is_here else pytest.importorskip(name)


def fresh(name: str, **options: Any) -> Any:
    """A model of its own, for a test that changes it."""
    return mm.load(name, **options)


@cache
def model(name: str) -> Any:
    return mm.load(name)


@cache
def pictures() -> Tensor:
    images = sample_images()
    return model("tiny-clip").prepare(images=[images["red_circle"], images["blue_square"]])["pixel_values"]


TOKENS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


class Embeds(nn.Module):
    """tiny-clip's images as a plain torch module: what the vision tower is compared with."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip = clip
        self.eval()

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.clip.get_image_features(pixel_values).pooler_output


class Logits(nn.Module):
    """tiny-llava's next words as a plain torch module: what the language tower is compared with."""

    def __init__(self, llava: Any) -> None:
        super().__init__()
        self.llava = llava
        self.eval()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.llava(input_ids=input_ids).logits


def layer(i: int) -> nn.Module:
    return model("tiny-clip").wrapped.vision_model.encoder.layers[i]
