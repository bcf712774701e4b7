"""A module or pipeline that is here already: where it is asked to be, and with what prepares its inputs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mm_adapters._errors import CheckpointError, InputError
from mm_adapters.checkpoints.from_transformers import processor_beside
from mm_adapters.checkpoints.open import dtype_of, modules_of
from mm_adapters.checkpoints.placement import check_device, is_placed
from mm_adapters.checkpoints.source import Source
from mm_adapters.inputs.from_model import inputs_for
from mm_adapters.inputs.prepare import Inputs
from mm_adapters.nnsight_engine.tokenizer_settings import pad_as_nnsight
from mm_adapters.sites.site_map import SiteMap

PARTS = ("processor", "tokenizer", "image_processor")
_TAKEN = (*PARTS, "device", "dtype", "torch_dtype", "dispatch")


def ready(model: Any, options: Mapping[str, Any], inputs: Inputs | None = None) -> Inputs | None:
    """Moves and casts a model as asked, as its own `.to` does, and returns what prepares its inputs.

    That is `inputs` if they are given. Without them and a processor or tokenizer among the `options`, those
    beside the checkpoint are taken that a model of transformers was loaded from; None if there are none.

    Raises: InputError for an option of loading, a device that is not here, or a model that its library
    placed.
    """
    unknown = [name for name in options if name not in _TAKEN]
    if unknown:
        raise InputError(
            f"{', '.join(unknown)}: of use with a name only, and the model is here already. It takes "
            f"{', '.join(f'{name}=' for name in _TAKEN)}."
        )
    _place(model, options.get("device"), options.get("torch_dtype", options.get("dtype")))
    if inputs is not None:
        return inputs
    parts = {k: options[k] for k in PARTS if options.get(k) is not None} or _beside(model)
    if not parts:
        return None
    sites = SiteMap(model)
    inputs = inputs_for(model, sites=sites, **parts)
    if inputs.kind != "diffusion":
        pad_as_nnsight(inputs.tokenizer, model, sites)
    return inputs


def _place(model: Any, device: Any, dtype: Any) -> None:
    dtype = dtype_of(None if dtype == "auto" else dtype)
    if device is None and dtype is None:
        return
    where = None if device is None else check_device(device)
    modules = modules_of(model)
    if any(is_placed(module) for module in (model, *modules)):
        raise InputError(
            "This model's weights were placed or packed by its library (device_map=, quantization_config=), "
            "and stay as they are. Leave device and dtype out."
        )
    for module in modules:
        module.to(device=where, dtype=dtype)  # type: ignore[call-overload]


def _beside(model: Any) -> dict[str, Any]:
    """The processor beside the checkpoint that a model of transformers says it was loaded from."""
    name = getattr(model, "name_or_path", None) if isinstance(model, nn.Module) else None
    if not name or not isinstance(name, str | os.PathLike):
        return {}
    folder = Path(name)
    source = Source(str(folder), folder) if folder.is_dir() else Source.at_hub(str(name), {})
    try:
        return processor_beside(source)
    except CheckpointError:  # It takes its own tensors then; raw text is an error that says so.
        return {}
