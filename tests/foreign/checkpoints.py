"""The checkpoints that nnsight's own tests name, as small ones made here: the zoo's, and tiny random ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import tiny
import tiny_diffusion
import tiny_vision

from mm_adapters import zoo


def make(folder: Path) -> dict[str, str]:
    """A folder for each repository of the hub that the tests ask for."""
    writers = {
        "trl-internal-testing/tiny-LlavaForConditionalGeneration": _llava,
        "hf-internal-testing/tiny-random-ViTForImageClassification": _vit,
        "hf-internal-testing/tiny-stable-diffusion-torch": _stable_diffusion,
        "hf-internal-testing/tiny-sdxl-pipe": lambda at: tiny.stable_diffusion_xl().model.save_pretrained(at),
        "hf-internal-testing/tiny-sd3-pipe": lambda at: (
            tiny_diffusion.stable_diffusion_3().model.save_pretrained(at)
        ),
        "hf-internal-testing/tiny-flux-pipe": lambda at: tiny_diffusion.flux().model.save_pretrained(at),
    }
    for name, write in writers.items():
        write(folder / name.partition("/")[2])
    return {name: str(folder / name.partition("/")[2]) for name in writers}


def _llava(folder: Path) -> None:
    """tiny-llava, which here has no end token, so that it generates as many tokens as it may."""
    _copy("tiny-llava", folder)
    _change(folder / "generation_config.json", eos_token_id=None)


def _stable_diffusion(folder: Path) -> None:
    """tiny-sd, which here draws as large as the tests expect: 128 pixels."""
    _copy("tiny-sd", folder)
    _change(folder / "unet/config.json", sample_size=32)


def _vit(folder: Path) -> None:
    from transformers import ViTImageProcessor

    model = tiny_vision.vit_classifier().model
    model.save_pretrained(folder)
    side = model.config.image_size
    ViTImageProcessor(size={"height": side, "width": side}).save_pretrained(folder)


def _copy(name: str, folder: Path) -> None:
    shutil.copytree(zoo.path(name), folder)


def _change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")
