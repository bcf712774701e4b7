"""A site's point, as the hooks that feed it see it: given a value, it returns the value or an edited one."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mm_adapters._errors import InputError
from mm_adapters.records.spec import Site


class PointHook(Protocol):
    """A hook on the model that feeds points, and is on only while one of them is live."""

    module: nn.Module

    @property
    def live(self) -> bool: ...

    def count(self, change: int) -> None: ...

    def check(self) -> None: ...


@runtime_checkable
class Point(Protocol):
    """Where a site's values pass: called with one, it returns it or an edited one.

    It is `live` while a hook is active on it; `module_hooks` are what feeds it.
    """

    @property
    def site(self) -> Site: ...

    @property
    def live(self) -> bool: ...

    @property
    def module_hooks(self) -> list[PointHook]: ...

    def move(self, site: Site) -> None:
        """Leaves its module hooks, for the model has other modules now; those of the site are added next."""
        ...

    def refresh(self) -> None:
        """Tells its module hooks whether it is live."""
        ...

    def __call__(self, x: Tensor) -> Tensor: ...


def show(point: Point, x: Tensor) -> tuple[Tensor, bool]:
    """What a point returns for a value, and whether it changed: a hook may write into the value."""
    version = None if x.is_inference() else x._version
    new = point(x)
    return new, new is not x or (version is not None and x._version != version)


def check_like(site: str, x: Tensor, new: object) -> None:
    """Passes if `new` can stand in a value's place.

    TransformerLens leaves it to the layers behind a hook; there another shape may broadcast, in silence.
    Raises: InputError if it is no tensor, has another shape, or is complex.
    """
    if not isinstance(new, Tensor):
        raise InputError(f"A hook at {site} returned {type(new).__name__}. It returns a tensor, or None.")
    if new.shape != x.shape:
        raise InputError(
            f"A hook at {site} was given {tuple(x.shape)} and returned {tuple(new.shape)}. It returns a "
            "tensor of the same shape, or None."
        )
    if new.is_complex() and not x.is_complex():
        raise InputError(f"A hook at {site} was given {x.dtype} and returned complex numbers.")


def tracked(x: Tensor) -> bool:
    """Whether autograd follows a tensor."""
    # A site must lie on the path to the output for its gradient to exist.
    return x.requires_grad and torch.is_grad_enabled()
