"""A site as TransformerLens' HookPoint: torch hooks are on the model only while it has an active hook."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformer_lens.hook_points import HookPoint

from mm_adapters.hooks.module_hooks import ModuleHook
from mm_adapters.hooks.point import check_like
from mm_adapters.records.spec import Site


class SitePoint(HookPoint):
    """The HookPoint of one site. Its first hook puts torch hooks on the model, its last takes them off."""

    site: Site
    live: bool
    module_hooks: list[ModuleHook]

    def __init__(self, site: Site) -> None:
        super().__init__()
        # Plain entries: nn.Module's own __setattr__ is slow, and `live` changes often.
        self.__dict__.update(site=site, module_hooks=[], live=False)

    def layer(self) -> int:
        """The layer, counted within the tower (TransformerLens reads it off the name)."""
        if self.site.layer is None:
            raise ValueError(f"{self.site.name} belongs to no layer.")
        return self.site.layer

    def __call__(self, x: Tensor) -> Tensor:
        """The value, or what its hooks return in its place. Raises: InputError if that cannot stand there."""
        new = super().__call__(x)
        if new is not x:
            check_like(self.site.name, x, new)
        return new

    # Every way on passes through torch's own two; TransformerLens' one way off is `remove_hooks`.
    def remove_hooks(self, *args: Any, **kwargs: Any) -> None:
        if self.fwd_hooks or self.bwd_hooks:
            super().remove_hooks(*args, **kwargs)
            self.refresh()

    def register_forward_hook(self, *args: Any, **kwargs: Any):
        handle = super().register_forward_hook(*args, **kwargs)
        self.refresh()
        return handle

    def register_full_backward_hook(self, *args: Any, **kwargs: Any):
        handle = super().register_full_backward_hook(*args, **kwargs)
        self.refresh()
        return handle

    def refresh(self) -> None:
        """Tells its module hooks whether it has an active hook, if that has changed."""
        live = bool(self._forward_hooks or self._backward_hooks)
        if live != self.live:
            self.__dict__["live"] = live
            for module_hook in self.module_hooks:
                module_hook.count(1 if live else -1)
