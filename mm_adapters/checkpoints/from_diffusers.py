"""diffusers' pipelines, by the class their index names."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from mm_adapters._errors import CheckpointError, InputError, NoSuchClassError
from mm_adapters.checkpoints.checks import check_pipeline, check_weights, read_json, stored_dtype
from mm_adapters.checkpoints.complete import check_filled, check_kinds, check_report
from mm_adapters.checkpoints.placement import check_map, is_placed, names_in
from mm_adapters.checkpoints.source import Source
from mm_adapters.inputs.call_names import parameters_of, unknown_name
from mm_adapters.records.registry import covers
from mm_adapters.records.spec import ModelRecord
from mm_adapters.sites.lookup import unknown
from mm_adapters.sites.not_in_checkpoint import note_missing

# What a pipeline's from_pretrained takes without declaring it.
_OPTIONS = (
    "dtype", "variant", "revision", "cache_dir", "token", "local_files_only", "force_download", "proxies",
    "custom_pipeline", "custom_revision", "low_cpu_mem_usage", "quantization_config", "max_memory",
    "device_map", "offload_folder", "offload_state_dict", "provider", "sess_options", "provider_options",
    "use_onnx", "load_connected_pipeline", "disable_mmap", "use_flashpack",
)  # fmt: skip


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
    path = source.file("model_index.json")
    assert path is not None
    index = read_json(path)
    cls = _named(source, index)
    chosen = _chosen(automodel) or cls
    if _can_be_built(chosen):
        cls = chosen
    if not covers(cls):
        raise unknown(_outline(source, index, cls), ModelRecord)
    _check_options(cls if _can_be_built(chosen) else None, index, options)
    _check_map(options.get("device_map"))
    if device_wanted.type == "meta":
        return cls(**_without_weights(source, index, cls))
    folder = source.folder
    if folder is None:
        fetch = {k: v for k, v in options.items() if k in {*source.where, "variant"}}
        folder = Path(source.read(cls.download, **fetch))
    variant = options.get("variant")
    files = check_pipeline(folder, index, given=options.keys(), variant=variant)
    check_kinds(file for part in files.values() for file in part)
    if dtype is None:
        denoiser = next((files[n] for n in ("unet", "transformer") if n in files), None)
        dtype = stored_dtype(denoiser[0]) if denoiser else torch.float32
    rest = {k: v for k, v in options.items() if k not in source.where}
    # diffusers itself packs the parts, or spreads them; else they are as read here.
    by_diffusers = rest.get("quantization_config") is not None or rest.get("device_map") == "balanced"
    read_parts = _transformers_parts(folder, index, files, dtype, rest, report_only=by_diffusers)
    rest |= {} if by_diffusers else read_parts
    pipeline = Source(str(folder), folder).read(chosen.from_pretrained, dtype=dtype, **rest)
    parts = {n: p for n, p in pipeline.components.items() if isinstance(p, torch.nn.Module)}
    check_filled({f"{source.name}/{name}": part for name, part in parts.items() if not is_placed(part)})
    return pipeline


def load_diffusers_model(
    source: Source,
    config: dict[str, Any],
    device_wanted: torch.device,
    dtype: torch.dtype | None,
    *,
    strict: bool = True,
    **options: Any,
) -> torch.nn.Module:
    """One model of diffusers (a UNet, an autoencoder), as it stands in a pipeline's folder.

    With `strict=False` weights that it lacks are random, and noted on the model.

    Raises: CheckpointError if it is none, or cannot be read; UnknownFamilyError if no family covers it.
    """
    cls = _named(source, config)
    if not (isinstance(cls, type) and issubclass(cls, torch.nn.Module)):
        at = "" if source.folder is None else f": mm_adapters.load({str(source.folder.parent)!r})"
        raise CheckpointError(
            f"{source.name} is a {cls.__name__}, which has no sites. Load its pipeline{at}."
        )
    kind: Any = cls
    with torch.device("meta"):
        outline = kind.from_config(config)
    if not covers(cls):
        raise unknown(outline, ModelRecord)
    check_map(options.get("device_map"), lambda: names_in(outline))
    if device_wanted.type == "meta":
        return outline
    if options.get("quantization_config") is not None:
        options.setdefault("device_map", {"": device_wanted})
    if source.folder is not None:
        files = check_weights(source.folder, options.get("variant"))
        check_kinds(files)
        dtype = dtype or stored_dtype(files[0])
    more: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    if strict:
        model, report = source.read(kind.from_pretrained, output_loading_info=True, **more, **options)
        check_report(source.name, report)
        return model
    placed = [name for name in ("device_map", "quantization_config") if options.get(name) is not None]
    if placed:
        raise InputError(
            f"strict=False with {placed[0]}: diffusers leaves lacking weights without values there. Load it "
            f"without {placed[0]}."
        )
    # Else those that it lacks stay on the meta device; so they are memory that nothing was written to.
    more |= {"low_cpu_mem_usage": False}
    model, report = source.read(kind.from_pretrained, output_loading_info=True, **(options | more))
    lacking = sorted(report["missing_keys"])
    if lacking:
        drawn, held = kind.from_config(config).state_dict(), model.state_dict()
        for name in lacking:
            held[name].copy_(drawn[name])
    note_missing(model, lacking)
    return model


def _transformers_parts(
    folder: Path,
    index: dict[str, Any],
    files: Mapping[str, Any],
    dtype: Any,
    options: Mapping[str, Any],
    report_only: bool,
) -> dict[str, Any]:
    """A pipeline's models of transformers, read here: diffusers does not say what they lack.

    With `report_only` their weights are compared with the files by name, and not read.
    """
    import transformers

    parts: dict[str, Any] = {}
    for name in files.keys() - options.keys():
        library, class_name = index[name]
        cls = getattr(transformers, str(class_name), None) if library == "transformers" else None
        if not (isinstance(cls, type) and issubclass(cls, torch.nn.Module)):
            continue
        kind: Any = cls
        variant = options.get("variant")
        more = {"variant": variant} if variant and any(variant in file.name for file in files[name]) else {}
        source = Source(str(folder / name), folder / name)
        if report_only:
            more["device_map"] = "meta"
        own = dtype.get(name, dtype.get("default", torch.float32)) if isinstance(dtype, dict) else dtype
        parts[name], report = source.read(kind.from_pretrained, dtype=own, output_loading_info=True, **more)
        check_report(source.name, report)
    return parts


def _named(source: Source, index: dict[str, Any]) -> Any:
    import diffusers

    named = index.get("_class_name")
    cls = getattr(diffusers, named, None) if isinstance(named, str) else None
    if cls is None:
        raise CheckpointError(
            f"{source.name} is a {named}, which diffusers {diffusers.__version__} does not have. "
            "Build it yourself and pass it to mm_adapters.wrap."
        )
    return cls


def _chosen(automodel: Any) -> Any:
    import diffusers

    if not isinstance(automodel, str):
        return automodel
    cls = getattr(diffusers, automodel, None)
    if cls is None:
        names = [n for n in dir(diffusers) if n.endswith("Pipeline") or n.startswith("AutoPipeline")]
        near = difflib.get_close_matches(automodel, names, n=3)
        raise NoSuchClassError(
            f"automodel={automodel!r}: diffusers has no such class. "
            + (f"Did you mean {' or '.join(near)}?" if near else "Pass a pipeline's class, or its name.")
        )
    return cls


def _check_options(cls: Any, index: dict[str, Any], options: Mapping[str, Any]) -> None:
    """Raises: InputError for an option that neither from_pretrained nor the pipeline takes."""
    takes = parameters_of(cls.__init__).keys() if cls is not None else index.keys()
    known = {*takes, *_OPTIONS}
    if unknown_options := [name for name in options if name not in known]:
        raise unknown_name("Loading a pipeline does not take", unknown_options, sorted(known))


def _check_map(device_map: Any) -> None:
    """Raises: InputError for a map that diffusers takes of its models, and not of its pipelines."""
    from diffusers.pipelines.pipeline_utils import SUPPORTED_DEVICE_MAP

    if device_map is not None and device_map not in SUPPORTED_DEVICE_MAP:
        raise InputError(
            f"device_map={device_map!r}: diffusers spreads a pipeline by its parts only, with "
            f"{' or '.join(map(repr, SUPPORTED_DEVICE_MAP))}. To spread one part, load it with its own "
            "device_map (UNet2DConditionModel.from_pretrained(...)) and pass it: load(name, unet=part)."
        )


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
