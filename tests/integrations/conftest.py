"""Images of the zoo's world, the shipped models, and SAELens' small configs."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

import mm_adapters as mm
from mm_adapters.zoo import world


@pytest.fixture(scope="session")
def clip() -> Any:
    return mm.load("tiny-clip")


@pytest.fixture(scope="session")
def images() -> list[Image.Image]:
    scenes = [world.scene(i, "test", seed=3) for i in range(48)]
    return [Image.fromarray(picture) for picture in world.render_batch(scenes)]
