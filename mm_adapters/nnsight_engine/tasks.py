"""What transformers calls the task of a kind of model."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

TASKS = {"contrastive": "zero-shot-image-classification", "vlm": "image-text-to-text"}
