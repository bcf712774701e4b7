"""Files and folders that are taken for a model's, and how to load what is in them."""

from __future__ import annotations

import json
from pathlib import Path

_PICKLED = (".ckpt", ".pt", ".pth", ".bin")
_LORA = "pytorch_lora_weights.safetensors"
_EMBEDDING = "learned_embeds.safetensors"


def of_file(file: Path) -> str:
    """What to do with one file, which `load` does not take."""
    said = f"{file} is one file, and a model is loaded from a folder with its config.json."
    if (file.parent / "config.json").is_file() or (file.parent / "model_index.json").is_file():
        return f"{said} That is here: mm_adapters.load({str(file.parent)!r})."
    if file.suffix in _PICKLED:
        return f"{said} It is pickled, which can run code as it is read: get it as .safetensors."
    return (
        f"{said} If it is a whole diffusion model, diffusers reads it: "
        f"pipe = diffusers.StableDiffusionPipeline.from_single_file({str(file)!r}); "
        "mm_adapters.wrap(pipe). If it is "
        "open_clip's: mm_adapters.load('open_clip:ARCH/FILE')."
    )


def of_folder(folder: Path) -> str | None:
    """What to do with a folder of an adapter, or of a pipeline's tokenizer; None if it is neither."""
    if (folder / "config.json").is_file() or (folder / "model_index.json").is_file():
        return None
    settings = folder / "adapter_config.json"
    if settings.is_file():
        base = _base(settings)
        return (
            f"{folder} is an adapter of {base} (peft), not a model. Load that with transformers and put "
            "the adapter "
            f"on it: base = ...from_pretrained({base!r}); model = peft.PeftModel.from_pretrained(base, "
            f"{str(folder)!r}).merge_and_unload(); mm_adapters.wrap(model, processor=...)."
        )
    if (folder / _LORA).is_file():
        return (
            f"{folder} is a LoRA adapter of a pipeline, not a model. Load the pipeline it was trained on "
            "and put the "
            f"adapter on it: pipe.load_lora_weights({str(folder)!r}); mm_adapters.wrap(pipe)."
        )
    if (folder / _EMBEDDING).is_file():
        return (
            f"{folder} is a textual inversion embedding, not a model. Load the pipeline it was trained "
            "on and put "
            f"it there: pipe.load_textual_inversion({str(folder)!r}); mm_adapters.wrap(pipe)."
        )
    if (folder.parent / "model_index.json").is_file():
        return (
            f"{folder} is a part of a pipeline and holds no model: its folder is {folder.parent}. Load that: "
            f"mm_adapters.load({str(folder.parent)!r})."
        )
    return None


def _base(settings: Path) -> str:
    try:
        named = json.loads(settings.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError):
        named = None
    return str(named or "its base model")
