"""What this engine's parts ask of the interleaver and of the model, so that none of them imports either."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from mm_adapters.checkpoints.origin import CheckpointRef
from mm_adapters.hooks.wiring import Points
from mm_adapters.records.spec import Guidance
from mm_adapters.sites.site_map import SiteMap


class ServedPoint(Protocol):
    """A site's point, as the interleaver uses it."""

    location: str
    hooks: dict[int, Callable[..., Any]]


class Interleaving(Protocol):
    """The interleaver, as points use it."""

    parked: set[str]
    observers: dict[str, Any]
    is_serving: bool

    def handle(self, provider: str, value: Any) -> Any: ...

    def is_requested(self, location: str) -> bool: ...

    def count_passed(self, points: Iterable[ServedPoint]) -> None: ...

    def update_hooks(self, point: ServedPoint) -> None: ...

    def serving(self) -> AbstractContextManager[None]: ...


class SiteModel(Protocol):
    """A traced model, as its envoys and a recorded run use it."""

    path: str
    interleaver: Any
    sitemap: SiteMap
    on_stock_service: bool

    @property
    def wrapped(self) -> Any: ...

    @property
    def points(self) -> Points: ...

    @property
    def in_process(self) -> bool: ...

    def envoy(self, name: str) -> Any: ...

    def is_guided(self, arguments: Mapping[str, Any], guidance: Guidance) -> bool: ...


class JobModel(Protocol):
    """A traced model, as a remote job uses it."""

    path: str
    sitemap: SiteMap
    origin: CheckpointRef | None
    service_packages: dict[str, dict[str, str]]

    @property
    def kind(self) -> str: ...

    def to_model_key(self) -> str: ...

    def _remoteable_get_env(self) -> dict[str, Any]: ...
