"""A checkpoint by its name: where it is, what reads it, and what prepares its inputs."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from mm_adapters._errors import CheckpointError, InputError
from mm_adapters.checkpoints import shipped
from mm_adapters.checkpoints.complete import check_numbers
from mm_adapters.checkpoints.from_diffusers import load_pipeline
from mm_adapters.checkpoints.from_open_clip import load_open_clip
from mm_adapters.checkpoints.from_transformers import load_module, processor_beside
from mm_adapters.checkpoints.not_a_model import of_file, of_folder
from mm_adapters.checkpoints.origin import CheckpointRef
from mm_adapters.checkpoints.placement import computes_on, is_placed
from mm_adapters.checkpoints.source import Source
from mm_adapters.inputs.from_model import inputs_for
from mm_adapters.inputs.prepare import Inputs
from mm_adapters.sites.site_map import SiteMap

_REFUSED = {
    "trust_remote_code": "Code that comes with a checkpoint is never run",
    "use_safetensors": "Weights are read from safetensors only",
    "torch_dtype": "It is called dtype",
    "output_loading_info": "Weights that are missing are an error",
}


class OpenedCheckpoint(NamedTuple):
    """A model or pipeline in eval mode, what prepares its inputs, where a service finds it, and its sites."""

    model: Any
    inputs: Inputs
    origin: CheckpointRef | None
    sites: SiteMap


def open_checkpoint(
    name: str,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    options: Any,
    without_weights: bool = False,
    **parts: Any,
) -> OpenedCheckpoint:
    """The model or pipeline of a checkpoint.

    The arguments are `load`'s; `parts` (processor, tokenizer, image_processor) are taken instead of
    those beside the checkpoint. With `without_weights` it is on the meta device, and the options are
    checked as if they were read. Raises: as `load`.
    """
    for option in _REFUSED.keys() & options.keys():
        raise InputError(f"load does not take {option}: {_REFUSED[option]}.")
    device_wanted, precision = computes_on(device, options.get("device_map")), dtype_of(dtype)
    device_wanted = torch.device("meta") if without_weights else device_wanted
    precision = precision or (torch.float32 if device_wanted.type == "cpu" else None)
    if name.startswith("open_clip:"):
        model, tokenizer, transform = load_open_clip(name.removeprefix("open_clip:"), **options)
        parts = {"tokenizer": tokenizer, "image_processor": transform} | parts
    else:
        source = _source(name, options)
        if source.file("model_index.json") is not None:
            model = load_pipeline(source, device_wanted, precision, **options)
            precision = None  # As of a module, below.
        else:
            model = load_module(source, device_wanted, precision, **options)
            precision = None  # from_pretrained was given it, and keeps some weights and buffers in float32.
            parts = parts or processor_beside(source)
    for module in modules_of(model):
        if not (is_placed(model) or is_placed(module)):
            module.to(device_wanted) if precision is None else module.to(device_wanted, precision)
        module.eval()
    check_numbers(name, {"": model} if isinstance(model, nn.Module) else parts_of(model))
    sites = SiteMap(model)
    return OpenedCheckpoint(
        model, inputs_for(model, sites=sites, **parts), CheckpointRef.of(name, options), sites
    )


def dtype_of(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None:
        return None
    named = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if isinstance(named, torch.dtype) and named.is_floating_point:
        return named
    raise InputError(f"dtype={dtype!r} is none a model runs in. Try float32, float16 or bfloat16.")


def modules_of(model: Any) -> list[nn.Module]:
    return [model] if isinstance(model, nn.Module) else [*parts_of(model).values()]


def parts_of(pipeline: Any) -> dict[str, nn.Module]:
    parts = getattr(pipeline, "components", {})
    return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}


def _source(name: str, options: Mapping[str, Any]) -> Source:
    if name in shipped.NAMES:
        folder = shipped.path(name)
        if not folder.is_dir():
            raise CheckpointError(
                f"{name} is not at {folder}. Install mm-interp again, or make it: "
                f"python -m mm_adapters.zoo.train {name}"
            )
        return Source(str(folder), folder)
    folder = Path(name).expanduser()
    if folder.is_dir():
        source = Source(str(folder), folder)
        if (advice := of_folder(folder)) is not None:
            raise CheckpointError(advice)
        if not source.has_any(("config.json", "model_index.json")):
            raise CheckpointError(
                f"{folder} has neither config.json nor model_index.json, so it is no checkpoint of "
                "transformers or diffusers. Pass the folder that save_pretrained wrote."
            )
        return source
    if folder.is_file():
        raise CheckpointError(of_file(folder))
    return _at_hub(name, options)


def _at_hub(name: str, options: Mapping[str, Any]) -> Source:
    near = difflib.get_close_matches(name, shipped.NAMES, n=1)
    source = Source.at_hub(name, options)
    try:
        if source.has_any(("model_index.json", "config.json")):
            return source
        reason = "its repository on the hub has neither config.json nor model_index.json"
    except CheckpointError as error:
        reason = f"as an id on the hub: {error}"
    raise CheckpointError(
        f"There is no model {name!r}: it is not one that ships with the package "
        f"({', '.join(shipped.NAMES)}), there is no such folder, and {reason}."
        + (f" Did you mean {near[0]!r}?" if near else "")
    )
