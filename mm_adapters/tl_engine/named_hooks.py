"""A whole model's hooks see sites under their full names; a tower's points have the tower's own names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from transformer_lens.hook_points import HookPoint


class NamedPoint:
    """A point as a hook of the whole model sees it: under its full name, all else the point's own."""

    def __init__(self, point: HookPoint, name: str) -> None:
        self._point = point
        self.name = name

    def __getattr__(self, name: str) -> Any:
        if name == "_point":  # Of a copy that is being made.
            raise AttributeError(name)
        return getattr(self._point, name)


def named(point: HookPoint, name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that is given the point under this name."""
    view = NamedPoint(point, name)

    def with_name(value: Any, *, hook: Any) -> Any:
        return plain(value, hook=view)

    plain = hook
    return with_name


class NamedHooks:
    """TransformerLens' ways to add a hook, for a model of several towers."""

    hook_dict: dict[str, Any]
    mod_dict: dict[str, Any]
    context_level: int
    add_hook: Callable[..., None]
    get_caching_hooks: Callable[..., Any]

    def check_and_add_hook(
        self, hook_point: Any, hook_point_name: str, hook: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> None:
        """As TransformerLens'; the hook sees the full name."""
        hook = named(hook_point, hook_point_name, hook)
        super().check_and_add_hook(hook_point, hook_point_name, hook, *args, **kwargs)  # type: ignore[misc]

    def add_caching_hooks(
        self,
        names_filter: Any = None,
        incl_bwd: bool = False,
        device: Any = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """As TransformerLens': hooks that fill a cache in later runs, until they are reset."""
        filled, forward, backward = self.get_caching_hooks(
            names_filter, incl_bwd, device, remove_batch_dim=remove_batch_dim, cache=cache
        )
        for direction, hooks in (("fwd", forward), ("bwd", backward)):
            for name, hook in hooks:
                self.add_hook(name, hook, dir=direction)
        return filled

    def _enable_hook_with_name(self, name: str, hook: Callable[..., Any], dir: Any) -> None:
        point = self.mod_dict[name]
        point.add_hook(named(point, name, hook), dir=dir, level=self.context_level)

    def _enable_hooks_for_points(
        self, hook_points: Iterable[tuple[str, Any]], enabled: Callable[[str], bool], hook: Any, dir: Any
    ) -> None:
        for name, point in hook_points:
            if enabled(name):
                point.add_hook(named(point, name, hook), dir=dir, level=self.context_level)
