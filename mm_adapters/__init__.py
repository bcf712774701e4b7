"""Multimodal models as TransformerLens and nnsight objects."""

from typing import TYPE_CHECKING, Any

from mm_adapters import families
from mm_adapters._errors import (
    AttentionUnreachableError,
    CheckpointError,
    EditNeverFiredError,
    HostAssertionError,
    HostMemberError,
    InputError,
    MetaDeviceError,
    MissingSiteError,
    ModelBusyError,
    ModelStateError,
    NoSuchClassError,
    ReadNeverFiredError,
    StateDictError,
    StoreError,
    UnfitCheckpointError,
    UnknownFamilyError,
    WordNotFoundError,
)
from mm_adapters.loading import load, wrap
from mm_adapters.records.registry import register
from mm_adapters.records.spec import Site
from mm_adapters.runs.lens import Call, Edit, Lens, Read, Receipt, Run
from mm_adapters.runs.model import Model
from mm_adapters.runs.schedule import Schedule
from mm_adapters.sites.site_map import SiteMap
from mm_adapters.sites.tower_view import TowerView
from mm_adapters.tokens.layout import TokenLayout

if TYPE_CHECKING:
    from mm_adapters.hooked import HookedModel
    from mm_adapters.tl_engine.tower import HookedTower
    from mm_adapters.traced import TracedModel


def __getattr__(name: str) -> Any:
    # nnsight changes every Python object when it is imported, so only who asks for it gets it; and a
    # service that runs nnsight need not have TransformerLens.
    if name == "TracedModel":
        from mm_adapters.traced import TracedModel

        return TracedModel
    if name == "HookedModel":
        from mm_adapters.hooked import HookedModel

        return HookedModel
    if name == "HookedTower":
        from mm_adapters.tl_engine.tower import HookedTower

        return HookedTower
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "AttentionUnreachableError",
    "Call",
    "CheckpointError",
    "Edit",
    "EditNeverFiredError",
    "HookedModel",
    "HookedTower",
    "HostAssertionError",
    "HostMemberError",
    "InputError",
    "Lens",
    "MetaDeviceError",
    "MissingSiteError",
    "Model",
    "ModelBusyError",
    "ModelStateError",
    "NoSuchClassError",
    "Read",
    "ReadNeverFiredError",
    "Receipt",
    "Run",
    "Schedule",
    "Site",
    "SiteMap",
    "StateDictError",
    "StoreError",
    "TokenLayout",
    "TowerView",
    "TracedModel",
    "UnfitCheckpointError",
    "UnknownFamilyError",
    "WordNotFoundError",
    "families",
    "load",
    "register",
    "wrap",
]
