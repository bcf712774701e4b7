"""diffusers' pipelines, by the class their index names."""

from __future__ import annotations

import inspect
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from mm_adapters._errors import CheckpointError
from mm_adapters.checkpoints.checks import check_pipeline, check_weights, read_json, stored_dtype
from mm_adapters.checkpoints.source import Source
from mm_adapters.records.registry import covers
from mm_adapters.records.spec import ModelRecord
from mm_adapters.sites.lookup import unknown


def load_pipeline(
    source: Source,
    device_wanted: torch.device,
    dtype: torch.dtype | None,
    *,
    automodel: Any = None,
    **options: Any,
) -> Any:
    """The pipeline, on the CPU, or without weights if `place` is "meta". No dtype: its denoiser's.

    `automodel`, a class of diffusers or its name, is made of it instead of the class that it names;
    one that chooses by the weights (AutoPipelineForImage2Image) only once they are read. `options` may
    hold components, which are then not read, or None for those to leave out.

    Raises: CheckpointError if it cannot be read; UnknownFamilyError if no family covers its class.
    """
    import diffusers

    path = source.file("model_index.json")
    assert path is not None
    index = read_json(path)
    named = index.get("_class_name")
    cls = getattr(diffusers, named, None) if isinstance(named, str) else None
    if cls is None:
        raise CheckpointError(
            f"{source.name} is a {named}, which diffusers {diffusers.__version__} does not have. "
            "Build it yourself and pass it to mm_adapters.wrap."
        )
    chosen = getattr(diffusers, automodel) if isinstance(automodel, str) else automodel or cls
    if _can_be_built(chosen):
        cls = chosen
    if not covers(cls):
        raise unknown(_outline(source, index, cls), ModelRecord)
    if device_wanted.type == "meta":
        return cls(**_without_weights(source, index, cls))
    folder = source.folder
    if folder is None:
        fetch = {k: v for k, v in options.items() if k in {*source.where, "variant"}}
        folder = Path(source.read(cls.download, **fetch))
    check_pipeline(folder, index, given=options.keys())
    if dtype is None:
        denoiser = next((folder / n for n in ("unet", "transformer") if (folder / n).is_dir()), None)
        dtype = stored_dtype(check_weights(denoiser)[0]) if denoiser else torch.float32
    local = Source(str(folder), folder)
    rest = {k: v for k, v in options.items() if k not in source.where}
    return local.read(chosen.from_pretrained, dtype=dtype, **rest)


def _can_be_built(cls: Any) -> bool:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    return isinstance(cls, type) and issubclass(cls, DiffusionPipeline) and cls is not DiffusionPipeline


def _outline(source: Source, index: dict[str, Any], cls: Any) -> Any:
    """A pipeline of an unknown class, without weights; without parts where it cannot be built so."""
    try:
        return cls(**_without_weights(source, index, cls))
    except (AttributeError, ImportError, OSError, RuntimeError, TypeError, ValueError):
        return cls.__new__(cls)


def _without_weights(source: Source, index: dict[str, Any], cls: Any) -> dict[str, Any]:
    """A pipeline's parts: modules on the meta device, and what has no weights (None if it cannot be read)."""
    import diffusers
    import transformers

    parts: dict[str, Any] = {}
    for name, entry in index.items():
        if not isinstance(entry, list) or len(entry) != 2:
            if not name.startswith("_"):
                parts[name] = entry
            continue
        library = {"transformers": transformers, "diffusers": diffusers}.get(entry[0])
        part_class: Any = getattr(library, str(entry[1]), None)
        parts[name] = None
        where = {"subfolder": name, **source.where}
        if (
            isinstance(part_class, type)
            and hasattr(part_class, "from_config")
            and not issubclass(part_class, torch.nn.Module)
        ):
            parts[name] = part_class.from_config(part_class.load_config(source.name, **where))
        elif isinstance(part_class, type) and issubclass(part_class, torch.nn.Module):
            kind: Any = part_class
            with torch.device("meta"):
                if library is diffusers:
                    parts[name] = kind.from_config(kind.load_config(source.name, **where))
                else:
                    parts[name] = kind(kind.config_class.from_pretrained(source.name, **where))
        elif (
            isinstance(part_class, type)
            and library is transformers
            and hasattr(part_class, "from_pretrained")
        ):
            with suppress(OSError, ValueError):
                parts[name] = part_class.from_pretrained(source.name, trust_remote_code=False, **where)
    takes = inspect.signature(cls.__init__).parameters
    return {name: part for name, part in parts.items() if name in takes}
