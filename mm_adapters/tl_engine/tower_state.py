"""A tower as a torch module: its parameters, modes, device and dtype are those of the model's own modules.

Names are the wrapped model's, so a tower's state loads into it and out of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from mm_adapters._errors import StateDictError
from mm_adapters.sites.tower_view import TowerView


class TowerState:
    """What `nn.Module` does to itself, done to the modules that the tower stands for."""

    cfg: Any
    name: str
    _root: Any
    _mounted: TowerView
    share_members: Callable[..., None]

    def own_modules(self) -> dict[str, nn.Module]:
        """The tower's module, and those that make its summary or its logits of it; by path from the model.

        The path is "" where the whole model is the tower.
        """
        mounted = self._mounted
        owners = {mounted.path: mounted.module}
        for path in (mounted.mount.project or "").replace(" @ ", "|").split("|"):
            owner = path.removesuffix(".T").removesuffix(".weight")
            module = _module_at(mounted.model, owner) if owner else None
            inside = any(module is m for m in mounted.module.modules())
            if module is not None and not inside:
                owners[owner] = module
        return owners

    def share_own_members(self) -> None:
        """Shows the model's modules in which the tower's are, under their names in the model."""
        mounted: TowerView = self.__dict__["_mounted"]
        paths = self.own_modules()
        if "" in paths:
            self.share_members(paths[""])
        elif isinstance(mounted.model, nn.Module):
            self.share_members(mounted.model, frozenset(path.partition(".")[0] for path in paths))
        else:  # A pipeline's part, under the part's name.
            names = {path.partition(".")[0] for path in paths}
            parts = {name: getattr(mounted.model, name) for name in names}
            self.share_members(nn.ModuleDict(parts), frozenset(names))

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters under the wrapped model's names."""
        seen: set[int] = set()
        for path, module in self.own_modules().items():
            at = f"{prefix}{'.' if prefix and path else ''}{path}"
            for name, parameter in module.named_parameters(at, recurse, remove_duplicate):
                if not (remove_duplicate and id(parameter) in seen):
                    seen.add(id(parameter))
                    yield name, parameter

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The tower's parameters, in the model's order."""
        return (parameter for _, parameter in self.named_parameters(recurse=recurse))

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Buffers under the wrapped model's names."""
        for path, module in self.own_modules().items():
            at = f"{prefix}{'.' if prefix and path else ''}{path}"
            yield from module.named_buffers(at, recurse, remove_duplicate)

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        """The tower's buffers."""
        return (buffer for _, buffer in self.named_buffers(recurse=recurse))

    def state_dict(self, *args: Any, prefix: str = "", keep_vars: bool = False, **kwargs: Any) -> Any:
        """The wrapped model's, of this tower's modules alone."""
        state: dict[str, Any] = args[0] if args else kwargs.pop("destination", None) or {}
        for path, module in self.own_modules().items():
            state.update(
                module.state_dict(prefix=f"{prefix}{path}." if path else prefix, keep_vars=keep_vars)
            )
        return state

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Loads what `state_dict()` gave into the model.

        Raises: StateDictError if `strict` and names are missing or unknown; then nothing is loaded.
        """
        from torch.nn.modules.module import _IncompatibleKeys

        owned = self.own_modules()
        known = set(self.state_dict())
        missing, unknown = sorted(known - state_dict.keys()), sorted(state_dict.keys() - known)
        if strict and (missing or unknown):
            raise StateDictError(
                f"This state is not the {self.name} tower's. Missing keys: {missing[:3] or 'none'}. "
                f"Unexpected keys: {unknown[:3] or 'none'}. Give what state_dict() gives, or strict=False."
            )
        for path, module in owned.items():
            start = f"{path}." if path else ""
            part = {
                k.removeprefix(start): v for k, v in state_dict.items() if k.startswith(start) and k in known
            }
            module.load_state_dict(part, strict=False, assign=assign)
        return _IncompatibleKeys(missing, unknown)

    def train(self, mode: bool = True) -> Any:
        """Puts the tower's modules into training mode, or out of it."""
        for module in self.own_modules().values():
            module.train(mode)
        nn.Module.train(self, mode)  # type: ignore[arg-type]  # Its points.
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Freezes the tower's parameters, or frees them."""
        for parameter in self.parameters():
            parameter.requires_grad_(requires_grad)
        return self

    def to(self, *args: Any, print_details: bool = True, **kwargs: Any) -> Any:
        """As a module's: moves and casts the tower's modules."""
        return nn.Module.to(self, *args, **kwargs)  # type: ignore[arg-type]  # By `_apply`.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What `half`, `bfloat16`, `double`, `float`, `cuda`, `cpu` and `to` go through."""
        for module in self.own_modules().values():
            module._apply(fn, recurse)
        self._root.refresh_configs()
        return self

    def get_parameter(self, target: str) -> nn.Parameter:
        """The parameter of a name that `named_parameters` gives."""
        return dict(self.named_parameters())[target]

    def get_buffer(self, target: str) -> Tensor:
        """The buffer of a name that `named_buffers` gives."""
        return dict(self.named_buffers())[target]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of the tower's parameters."""
        for module in self.own_modules().values():
            module.zero_grad(set_to_none)

    @property
    def n_params_total(self) -> int:
        """How many numbers its parameters have, embeddings and biases too."""
        return sum(parameter.numel() for parameter in self.parameters())


def _module_at(model: Any, path: str) -> nn.Module | None:
    value = model
    for name in path.split("."):
        value = getattr(value, name, None)
    return value if isinstance(value, nn.Module) else None
