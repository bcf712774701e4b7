"""What transformers calls the task of a kind of model."""

from __future__ import annotations

TASKS = {"contrastive": "zero-shot-image-classification", "vlm": "image-text-to-text"}
