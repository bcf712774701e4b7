"""Families of this package as architectures of TransformerLens' own TransformerBridge.

The entry points of the group `transformer_lens.architectures` name one adapter for each class here,
made from the family's record. TransformerLens' loader by name does not look at entry points (3.9,
model_bridge/sources/transformers.py), so a model is built first and then bridged: `bridge(model)`.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.factories.architecture_adapter_factory import (
    SUPPORTED_ARCHITECTURES,
    ArchitectureAdapterFactory,
)
from transformer_lens.model_bridge.sources import build_bridge_from_module

from integrations.transformer_lens._adapter import RecordAdapter
from integrations.transformer_lens._classes import architectures, cannot
from mm_adapters import InputError, Model

__all__ = ["RecordAdapter", "adapter", "architectures", "bridge", "cannot"]


def adapter(architecture: str) -> type[RecordAdapter]:
    """The adapter of one of `architectures()`."""
    return type(f"{architecture}Adapter", (RecordAdapter,), {})


def __getattr__(name: str) -> Any:  # An entry point is this module and a class's name.
    if name in architectures():
        return adapter(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def bridge(model: nn.Module | Model, *, processor: Any = None, tokenizer: Any = None) -> Any:
    """A TransformerBridge over a tower, or over a vision-language model's language tower and the rest.

    Its hooks are this package's sites: `blocks.3.attn.hook_pattern` of the tower itself, and of a
    vision-language model also `vision_encoder.blocks.3.attn.hook_pattern` and `vision_projector.hook_out`.
    The bridge replaces modules of `model`: give it a copy. Of what `mm_adapters.load` returns it takes a copy
    itself, with what prepares its inputs; a class that TransformerLens bridges itself (LLaVA) is then bridged
    by its own adapter, under its own names.

    Raises: InputError if TransformerLens has no adapter for its class and neither has this package.
    """
    loaded = isinstance(model, Model)
    if isinstance(model, Model):
        processor = processor or getattr(model.preparer, "processor", None)
        tokenizer = tokenizer or getattr(model.preparer, "tokenizer", None)
        module = copy.deepcopy(model).wrapped
    else:
        module = model
    architecture = type(module).__name__
    if loaded and architecture in SUPPORTED_ARCHITECTURES and architecture not in architectures():
        bridged = build_bridge_from_module(module, architecture, hf_config=module.config)
        return _with_inputs(bridged, processor, tokenizer)
    if architecture not in architectures():
        why = cannot().get(architecture)
        raise InputError(
            f"There is no adapter here for {architecture}{f': {why}' if why else ''}. "
            f"There is one for {', '.join(architectures())}. "
            "TransformerLens has its own for others: TransformerBridge.boot_transformers(...)."
        )
    # First what is installed: TransformerLens warns of an entry point whose name is taken.
    ArchitectureAdapterFactory.discover_entry_points()
    ArchitectureAdapterFactory.register_adapter(architecture, adapter(architecture))
    # The adapter reads the sizes off the model.
    cfg = TransformerBridgeConfig(d_model=1, d_head=1, n_layers=1, n_heads=1, n_ctx=1, d_vocab=1)
    bridged = build_bridge_from_module(module, architecture, tl_config=cfg)
    return _with_inputs(bridged, processor, tokenizer)


def _with_inputs(bridged: Any, processor: Any, tokenizer: Any) -> Any:
    bridged.processor = processor
    # Not through the builder, which makes it again from the name it was loaded by.
    bridged.tokenizer = tokenizer or getattr(processor, "tokenizer", None)
    return bridged.eval()
