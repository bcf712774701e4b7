"""`load` a model by name, folder or hub id; `wrap` one that is already here."""

from __future__ import annotations

import os
from typing import Any

import torch

from mm_adapters.checkpoints.open import _modules, open_checkpoint
from mm_adapters.inputs.from_model import inputs_for

_ENGINES = ("hooked", "nnsight")


def load(
    name: str | os.PathLike[str],
    *,
    engine: str = "hooked",
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    **options: Any,
) -> Any:
    """A model ready to be read and edited, in eval mode, with what prepares its texts and images.

    `name` is, in this order, a model that ships with the package ("tiny-clip"), an open_clip model
    ("open_clip:ViT-B-32/laion2b_s34b_b79k"), a folder, or an id on the hub. `device` is the first
    GPU if there is one, else the CPU; `dtype` is the checkpoint's on a GPU and float32 on the CPU.
    `engine` is "hooked" (a HookedModel, for TransformerLens) or "nnsight" (a TracedModel).
    On the device "meta" no weights are read: its sites can be listed and it cannot run. `options`
    go to the library's own from_pretrained; for a pipeline, `automodel` is the class of diffusers to
    make of the checkpoint ("StableDiffusionImg2ImgPipeline", "AutoPipelineForInpainting") instead of
    the one that it names.

    Raises: CheckpointError if it is not found or cannot be read; UnknownFamilyError if no family
    covers it; ValueError for a dtype, device, engine or option there is none of.
    """
    build = _engine(engine)
    model, inputs, origin = open_checkpoint(os.fspath(name), device, dtype, options)
    return build(model, inputs=inputs) if engine == "hooked" else build(model, inputs=inputs, origin=origin)


def wrap(
    model: Any,
    *,
    processor: Any = None,
    tokenizer: Any = None,
    image_processor: Any = None,
    engine: str = "hooked",
) -> Any:
    """Your own module or pipeline, to be read and edited; it is set to eval mode, else left as it is.

    A processor, or a tokenizer and an image processor, let it take raw text and images.

    Raises: UnknownFamilyError if no family covers it; ValueError if there is no such engine.
    """
    build = _engine(engine)
    inputs = inputs_for(model, processor=processor, tokenizer=tokenizer, image_processor=image_processor)
    for module in _modules(model):
        module.eval()
    return build(model, inputs=inputs)


def _engine(engine: str) -> Any:
    if engine not in _ENGINES:
        raise ValueError(f"There is no engine {engine!r}; there is {', '.join(_ENGINES)}.")
    if engine == "nnsight":
        from mm_adapters.traced import TracedModel

        return TracedModel
    from mm_adapters.hooked import HookedModel

    return HookedModel
