"""The zoo's models, read from a folder as any user would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def load(folder: Path, name: str) -> tuple[Any, Any]:
    """The model and its processor (None for a pipeline), read as any user would, in float32."""
    if name == "tiny-sd":
        from diffusers import StableDiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]

        return StableDiffusionPipeline.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        ), None
    from transformers import CLIPModel, CLIPProcessor, LlavaForConditionalGeneration, LlavaProcessor

    model_class, processor_class = {
        "tiny-clip": (CLIPModel, CLIPProcessor),
        "tiny-llava": (LlavaForConditionalGeneration, LlavaProcessor),
    }[name]
    model = model_class.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval(), processor_class.from_pretrained(folder, local_files_only=True)
