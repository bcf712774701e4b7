"""`load` a model by name, folder or hub id; `wrap` one that is already here."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from mm_adapters._errors import InputError
from mm_adapters.checkpoints.open import modules_of, open_checkpoint
from mm_adapters.inputs.call_names import refuse_unknown
from mm_adapters.inputs.from_model import inputs_for
from mm_adapters.sites.site_map import SiteMap

if TYPE_CHECKING:
    from mm_adapters.hooked import HookedModel
    from mm_adapters.traced import TracedModel

ENGINES = ("hooked", "nnsight")


@overload
def load(
    name: str | os.PathLike[str],
    *,
    engine: Literal["hooked"] = "hooked",
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    **options: Any,
) -> HookedModel: ...
@overload
def load(
    name: str | os.PathLike[str],
    *,
    engine: Literal["nnsight"],
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    **options: Any,
) -> TracedModel: ...
@overload
def load(
    name: str | os.PathLike[str],
    *,
    engine: str,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    **options: Any,
) -> HookedModel | TracedModel: ...
def load(
    name: str | os.PathLike[str],
    *,
    engine: str = "hooked",
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    **options: Any,
) -> Any:
    """A model ready to be read and edited, in eval mode, with what prepares its texts and images.

    Args:
        name: In this order, a model that ships with the package ("tiny-clip"), an open_clip model
            ("open_clip:ViT-B-32/laion2b_s34b_b79k"), a folder, or an id on the hub.
        engine: "hooked" (a HookedModel, for TransformerLens) or "nnsight" (a TracedModel).
        device: The first GPU if there is one, else the CPU. On "meta" no weights are read: the sites can
            be listed and the model cannot run.
        dtype: The checkpoint's own on a GPU, and float32 on the CPU.
        options: For the library's own from_pretrained: `device_map` in place of `device` (with
            `offload_folder`, `max_memory`) spreads a model over devices, the memory and the disk,
            `quantization_config` packs its weights. Of a pipeline, `automodel` is the class of
            diffusers to make of the checkpoint ("StableDiffusionImg2ImgPipeline",
            "AutoPipelineForInpainting") instead of the one that it names. Of one model of transformers or
            diffusers, `strict=False` leaves weights that the checkpoint lacks random; its repr names them.

    Raises: CheckpointError if it is not found or cannot be read; UnknownFamilyError if no family
    covers it; InputError for a dtype, device, engine or option there is none of.
    """
    build = _engine(engine)
    with torch.inference_mode(False):  # Weights made inside it could never be followed by autograd.
        model, inputs, origin, sites = open_checkpoint(os.fspath(name), device, dtype, options)
    if engine == "hooked":
        return build(model, inputs=inputs, sites=sites, loaded_as=os.fspath(name))
    return build(model, inputs=inputs, sites=sites, origin=origin)


@overload
def wrap(
    model: Any,
    *,
    processor: Any = None,
    tokenizer: Any = None,
    image_processor: Any = None,
    engine: Literal["hooked"] = "hooked",
) -> HookedModel: ...
@overload
def wrap(
    model: Any,
    *,
    processor: Any = None,
    tokenizer: Any = None,
    image_processor: Any = None,
    engine: Literal["nnsight"],
) -> TracedModel: ...
@overload
def wrap(
    model: Any,
    *,
    processor: Any = None,
    tokenizer: Any = None,
    image_processor: Any = None,
    engine: str,
) -> HookedModel | TracedModel: ...
def wrap(
    model: Any,
    *,
    processor: Any = None,
    tokenizer: Any = None,
    image_processor: Any = None,
    engine: str = "hooked",
    **unknown: Any,
) -> Any:
    """Your own module or pipeline, to be read and edited; it is set to eval mode, else left as it is.

    A processor, or a tokenizer and an image processor, let it take raw text and images.

    Raises: UnknownFamilyError if no family covers it; InputError if there is no such engine, or option.
    """
    refuse_unknown("wrap", unknown, ("processor", "tokenizer", "image_processor", "engine"))
    build = _engine(engine)
    sites = SiteMap(model)
    model = sites.model
    inputs = inputs_for(
        model, processor=processor, tokenizer=tokenizer, image_processor=image_processor, sites=sites
    )
    for module in modules_of(model):
        module.eval()
    return build(model, inputs=inputs, sites=sites)


def _engine(engine: str) -> Any:
    if engine not in ENGINES:
        raise InputError(f"There is no engine {engine!r}; there is {', '.join(ENGINES)}.")
    if engine == "nnsight":
        from mm_adapters.traced import TracedModel

        return TracedModel
    from mm_adapters.hooked import HookedModel

    return HookedModel
