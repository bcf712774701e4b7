"""Multimodal models as TransformerLens and nnsight objects."""

from mm_adapters import families
from mm_adapters._errors import (
    AttentionUnreachableError,
    CheckpointError,
    EditNeverFiredError,
    InputError,
    MetaDeviceError,
    MissingSiteError,
    UnknownFamilyError,
    WordNotFoundError,
)
from mm_adapters._lens import Edit, Lens, Read, Receipt, Run
from mm_adapters._registry import register
from mm_adapters._spec import Site
from mm_adapters._tokens import TokenLayout
from mm_adapters.hooked import HookedModel
from mm_adapters.loading import load, wrap

__all__ = [
    "AttentionUnreachableError",
    "CheckpointError",
    "Edit",
    "EditNeverFiredError",
    "HookedModel",
    "InputError",
    "Lens",
    "MetaDeviceError",
    "MissingSiteError",
    "Read",
    "Receipt",
    "Run",
    "Site",
    "TokenLayout",
    "UnknownFamilyError",
    "WordNotFoundError",
    "families",
    "load",
    "register",
    "wrap",
]
