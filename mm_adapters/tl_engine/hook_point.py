"""A site as TransformerLens' HookPoint: torch hooks are on the model only while it has an active hook."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformer_lens.hook_points import HookPoint

from mm_adapters._errors import InputError
from mm_adapters.hooks.module_hooks import ModuleHook
from mm_adapters.hooks.point import check_like
from mm_adapters.records.spec import Site

Change = Callable[[Tensor], Tensor]


class PointHandle(RemovableHandle):
    """The handle of a hook on a point, which tells the point when it is removed."""

    point: LivePoint | None = None

    def __init__(self, handle: RemovableHandle, point: LivePoint) -> None:
        self.__dict__.update(vars(handle), point=point)

    def remove(self) -> None:
        """Takes the hook off."""
        super().remove()
        if self.point is not None:
            self.point.refresh()


class LivePoint(HookPoint):
    """A HookPoint that is told when its first hook comes and its last one goes: `refresh`."""

    # Every way on passes through torch's own two, and every way off through a handle.
    def remove_hooks(self, *args: Any, **kwargs: Any) -> None:
        if self.fwd_hooks or self.bwd_hooks:
            super().remove_hooks(*args, **kwargs)

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> PointHandle:
        self.check()
        handle = PointHandle(super().register_forward_hook(*args, **kwargs), self)
        self.refresh()
        return handle

    def register_full_backward_hook(self, *args: Any, **kwargs: Any) -> PointHandle:
        self.check()
        handle = PointHandle(super().register_full_backward_hook(*args, **kwargs), self)
        self.refresh()
        return handle

    def check(self) -> None:
        """Raises: ModelStateError if no hook can be active here."""

    def refresh(self) -> None:
        """Looks whether a hook is active."""


class SitePoint(LivePoint):
    """The HookPoint of one site. Its first hook puts torch hooks on the model, its last takes them off.

    `first` and `last` change the value before and after its hooks do, for points that are made of sites.
    """

    site: Site
    live: bool
    module_hooks: list[ModuleHook]
    first: list[Change]
    last: list[Change]

    def __init__(self, site: Site) -> None:
        super().__init__()
        # Plain entries: nn.Module's own __setattr__ is slow, and `live` changes often.
        self.__dict__.update(site=site, module_hooks=[], live=False, first=[], last=[])

    def layer(self) -> int:
        """The layer, counted within the tower (TransformerLens reads it off the name)."""
        if self.site.layer is None:
            raise InputError(f"{self.site.name} belongs to no layer.")
        return self.site.layer

    def __call__(self, x: Tensor) -> Tensor:
        """The value, or what its hooks return in its place. Raises: InputError if that cannot stand there."""
        for change in self.first:
            x = change(x)
        # Module.__call__ without the look for compiled code, which a point never is.
        new: Any = self._call_impl(x)
        if new is not x:
            check_like(self.site.name, x, new)
        for change in self.last:
            new = change(new)
        return new

    def check(self) -> None:
        """Raises: ModelStateError if the model is in a state in which the site cannot be watched."""
        for module_hook in self.module_hooks:
            module_hook.check()

    def move(self, site: Site) -> None:
        """Leaves its module hooks, for the model has other modules now; those of the site are added next."""
        self.__dict__.update(site=site, module_hooks=[], live=False)

    def refresh(self) -> None:
        """Tells its module hooks whether it has an active hook, if that has changed."""
        live = bool(self._forward_hooks or self._backward_hooks or self.first or self.last)
        if live != self.live:
            self.__dict__["live"] = live
            for module_hook in self.module_hooks:
                module_hook.count(1 if live else -1)

    @contextmanager
    def changed(self, *, first: Change | None = None, last: Change | None = None) -> Iterator[None]:
        """Inside, its value is changed before its hooks see it, or after them."""
        pairs = [(self.first, first), (self.last, last)]
        for changes, change in pairs:
            if change is not None:
                changes.append(change)
        self.refresh()
        try:
            yield
        finally:
            for changes, change in pairs:
                if change is not None:
                    changes.remove(change)
            self.refresh()

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """It has no hooks inside."""
        before = {name: self.__dict__[name] for name in _HOOKS}
        self.__dict__.update({name: type(hooks)() for name, hooks in before.items()})
        self.refresh()
        try:
            yield
        finally:
            self.__dict__.update(before)
            self.refresh()


# Torch's own, TransformerLens' list of them, and the changes of points made of it.
_HOOKS = ("_forward_hooks", "_backward_hooks", "fwd_hooks", "bwd_hooks", "first", "last")
