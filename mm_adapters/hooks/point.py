"""A site's point, as the hooks that feed it see it: given a value, it returns the value or an edited one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from mm_adapters.records.spec import Site

if TYPE_CHECKING:
    from mm_adapters.hooks.module_hooks import ModuleHook


@runtime_checkable
class Point(Protocol):
    """Where a site shows itself: called with a value, it returns the value or an edited one."""

    @property
    def site(self) -> Site: ...

    @property
    def live(self) -> bool: ...

    @property
    def module_hooks(self) -> list[ModuleHook]: ...

    def __call__(self, x: Tensor) -> Tensor: ...


def show(point: Point, x: Tensor) -> tuple[Tensor, bool]:
    """What a point gives for a value, and whether that is another value: a hook may write into it."""
    version = None if x.is_inference() else x._version
    new = point(x)
    return new, new is not x or (version is not None and x._version != version)


@runtime_checkable
class Listener(Protocol):
    """What a tensor is kept for: a reader, or a whole tap."""

    @property
    def live(self) -> bool: ...


def tracked(x: Tensor) -> bool:
    """Whether a gradient is wanted of it."""
    # A site must lie on the path to the output for its gradient to exist.
    return x.requires_grad and torch.is_grad_enabled()
