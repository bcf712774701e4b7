"""transformers' models, by the class their configuration names, with what stands beside them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mm_adapters._errors import CheckpointError
from mm_adapters.checkpoints.checks import check_weights, read_json
from mm_adapters.checkpoints.complete import check_kinds, check_report
from mm_adapters.checkpoints.from_diffusers import load_diffusers_model
from mm_adapters.checkpoints.placement import check_map, names_in
from mm_adapters.checkpoints.source import Source
from mm_adapters.inputs.call_names import parameters_of, unknown_name
from mm_adapters.records.registry import covers
from mm_adapters.records.spec import ModelRecord
from mm_adapters.sites.lookup import unknown
from mm_adapters.sites.not_in_checkpoint import note_missing

# What from_pretrained takes without declaring it.
_OPTIONS = (
    "attn_implementation", "variant", "subfolder", "dtype", "quantization_config", "low_cpu_mem_usage",
    "key_mapping", "generation_config", "experts_implementation", "max_memory", "offload_folder",
    "offload_buffers", "device_map", "state_dict", "adapter_kwargs", "use_kernels", "tp_plan", "proxies",
)  # fmt: skip
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "spiece.model", "tokenizer.model",
)  # fmt: skip
_IMAGE_FILES = ("processor_config.json", "preprocessor_config.json")


def load_module(
    source: Source, device_wanted: torch.device, dtype: torch.dtype | None, **options: Any
) -> nn.Module:
    """The model, on the CPU, or without weights if `place` is "meta". No dtype: the checkpoint's own.

    Raises: CheckpointError if it cannot be read; UnknownFamilyError if no family covers its class.
    """
    path = source.file("config.json")
    if path is None:
        raise CheckpointError(f"{source.name} has no config.json. Is it the right folder?")
    config = read_json(path)
    strict = bool(options.pop("strict", True))
    if isinstance(config.get("_class_name"), str):
        return load_diffusers_model(source, config, device_wanted, dtype, strict=strict, **options)
    cls = _transformers_class(config, source)
    check_options(cls, options)
    if not covers(cls):  # Before any weight is read.
        raise unknown(_outline(cls, source), ModelRecord)
    check_map(options.get("device_map"), lambda: names_in(_without_weights(cls, source)))
    if device_wanted.type == "meta":
        model = _without_weights(cls, source, options.get("attn_implementation"))
        return model if dtype is None else model.to(dtype)
    if options.get("quantization_config") is not None:  # Some are packed where they compute.
        options.setdefault("device_map", {"": device_wanted})
    if source.folder is not None:
        files = check_weights(source.folder, options.get("variant"))
        if "quantization_config" not in config:
            check_kinds(files)
    model, report = source.read(
        cls.from_pretrained, dtype=dtype or "auto", output_loading_info=True, **options
    )
    if strict:
        check_report(source.name, report)
    note_missing(model, report["missing_keys"])
    return model


def check_options(cls: Any, options: Mapping[str, Any]) -> None:
    """Raises: InputError for an option that neither from_pretrained nor the configuration takes."""
    if options:
        known = {*parameters_of(cls.from_pretrained), *_OPTIONS} - {"pretrained_model_name_or_path"}
        settings = {n for n in dir(cls.config_class()) if not n.startswith("_")}
        unknown = [n for n in options if n not in known | settings]
        if unknown:
            raise unknown_name(f"Loading a {cls.__name__} does not take", unknown, sorted(known), settings)


def _without_weights(cls: Any, source: Source, attention: str | None = None) -> nn.Module:
    config = cls.config_class.from_pretrained(source.name, **source.where)
    if attention:
        config._attn_implementation = attention
    with torch.device("meta"):
        return cls(config)


def _outline(cls: Any, source: Source) -> nn.Module:
    """A model of an unknown class, without weights; without modules where it cannot be built so."""
    try:
        return _without_weights(cls, source)
    except (AttributeError, ImportError, NotImplementedError, OSError, RuntimeError, TypeError, ValueError):
        bare = cls.__new__(cls)
        nn.Module.__init__(bare)
        return bare


def processor_beside(source: Source) -> dict[str, Any]:
    """The processor beside a model, or its tokenizer or image processor if that is all there is."""
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    reads_text = source.has_any(_TOKENIZER_FILES)
    reads_images = source.has_any(_IMAGE_FILES)
    if reads_text and reads_images:
        part, auto = "processor", AutoProcessor
    elif reads_text:
        part, auto = "tokenizer", AutoTokenizer
    elif reads_images:
        part, auto = "image_processor", AutoImageProcessor
    else:
        return {}
    try:
        return {part: auto.from_pretrained(source.name, trust_remote_code=False, **source.where)}
    except Exception as error:  # noqa: BLE001  The tokenizers library raises no narrower one.
        raise CheckpointError(
            f"The {part} beside {source.name} cannot be read: {error}. Repair it, or load the model "
            "yourself and pass both to mm_adapters.wrap."
        ) from None


def _transformers_class(config: dict[str, Any], source: Source) -> Any:
    import transformers

    named = (config.get("architectures") or [None])[0]
    if named is not None:
        model_class = getattr(transformers, named, None)
        if inspect.isclass(model_class) and issubclass(model_class, nn.Module):
            return model_class
        why = ", and code that comes with a checkpoint is never run" if "auto_map" in config else ""
        raise CheckpointError(
            f"{source.name} is a {named}, which transformers {transformers.__version__} does not have{why}. "
            "Build it yourself and pass it to mm_adapters.wrap."
        )
    kind = str(config.get("model_type"))
    if kind not in transformers.CONFIG_MAPPING:
        raise CheckpointError(
            f"{source.name}: config.json names neither an architecture nor a model_type that transformers "
            f"{transformers.__version__} has (model_type is {kind!r})."
        )
    return transformers.MODEL_MAPPING[transformers.CONFIG_MAPPING[kind]]
