"""Whether the modules that sites were mapped from are still the ones in the model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


class ModuleTree:
    """The modules of a model as they were when this was made.

    `mounts` are the names under which a pipeline holds modules; a module holds its own.
    """

    def __init__(self, model: Any, mounts: Iterable[str]) -> None:
        self._model = model
        self._mounts = () if isinstance(model, nn.Module) else tuple(dict.fromkeys(mounts))
        self._parts = tuple(getattr(model, name, None) for name in self._mounts)
        roots = [model] if isinstance(model, nn.Module) else self._parts
        modules = [m for root in roots if isinstance(root, nn.Module) for m in root.modules()]
        self.modules = tuple({id(m): m for m in modules}.values())
        # A dictionary of children is one object as long as its module lives.
        self._children = [(m._modules, tuple(m._modules.values())) for m in modules if m._modules]

    def is_whole(self) -> bool:
        """Whether each module still holds the same ones, under any names."""
        for name, part in zip(self._mounts, self._parts, strict=True):
            if getattr(self._model, name, None) is not part:
                return False
        return all(tuple(children.values()) == before for children, before in self._children)
