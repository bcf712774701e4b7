"""The wrapped model's own modules and weights at a model's or tower's attributes, by their paths.

torch.func and torch.export reach weights so: by the names of `named_parameters()`, through attributes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mm_adapters._errors import InputError


class WrappedMembers:
    """`model.vision_model` is the wrapped model's module of that name, where no part of ours has it."""

    _modules: dict[str, nn.Module | None]

    def __getattr__(self, name: str) -> Any:
        children = self.__dict__.get("_wrapped_children", ())
        if name in children and name not in self._modules:
            return children[name]
        return super().__getattr__(name)  # type: ignore[misc]

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """As `nn.Module`'s; a part of ours may have the name of one of the wrapped model's."""
        if name in self.__dict__.get("_wrapped_children", ()):
            self._modules[name] = module
        else:
            super().add_module(name, module)  # type: ignore[misc]

    def check_no_export(self) -> None:
        """Raises: InputError if torch.export traces this call."""
        if torch.compiler.is_exporting():
            raise InputError(
                f"An exported program has no hooks, so a {type(self).__name__} is not exported. Export the "
                "model inside, which computes the same: torch.export.export(model.wrapped, ...)."
            )

    def share_members(self, module: nn.Module, names: frozenset[str] | None = None) -> None:
        """Shows a module's children under these names, or all; with all, its own weights are shared too.

        The dictionaries are the module's, so what is put into them is in the module.
        """
        if names is None:
            self.__dict__["_parameters"], self.__dict__["_buffers"] = module._parameters, module._buffers
            self.__dict__["_wrapped_children"] = module._modules
        else:
            self.__dict__["_wrapped_children"] = {n: m for n, m in module._modules.items() if n in names}
