"""An input for each model of the zoo, as a user would give it."""

from __future__ import annotations

from typing import Any

from mm_adapters.zoo import sample_images

INPUTS: dict[str, dict[str, Any]] = {
    "tiny-clip": {"text": ["a red circle", "a blue square"], "images": list(sample_images().values())[:2]},
    "tiny-llava": {"text": ["what colour is the circle?"], "images": [sample_images()["red_circle"]]},
    "tiny-sd": {"prompt": ["a red circle"], "num_inference_steps": 2, "seed": 0, "output_type": "pt"},
}
