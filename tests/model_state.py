"""Whether a model is as it was: weights, hooks, modes, what torch is set to, and its output, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Snapshot:
    """All of a model that a run must leave as it is; `numbers` is its output on a fixed input."""

    weights: dict[str, Tensor]
    modes: dict[str, bool]
    wants_gradient: dict[str, bool]
    hooks: dict[str, tuple[int, ...]]
    modules: dict[str, type]
    active: tuple[str, ...]
    torch_is_set: tuple[Any, ...]
    numbers: Tensor

    def changes(self, since: Snapshot) -> list[str]:
        """What is another than `since`, in words; empty if nothing is."""
        said = []
        for name in ("modes", "wants_gradient", "hooks", "modules"):
            now, before = getattr(self, name), getattr(since, name)
            different = [at for at in now.keys() | before.keys() if now.get(at) != before.get(at)]
            said += [f"{name} at {at}: {before.get(at)} is now {now.get(at)}" for at in sorted(different)[:3]]
        said += [f"the weight {n}" for n, w in self.weights.items() if not _same(w, since.weights.get(n))]
        for name in ("active", "torch_is_set"):
            now, before = getattr(self, name), getattr(since, name)
            said += [f"{name}: {before} is now {now}"] if now != before else []
        return said if _same(self.numbers, since.numbers) else [*said, "the output"]


def snapshot(model: Any, output: Callable[[], Tensor]) -> Snapshot:
    """What a HookedModel or TracedModel is now. `output` runs the library's model on a fixed input."""
    torch_is_set = _torch_is_set()  # Before anything runs here.
    named = {f"{at}{n}": m for at, root in _roots(model.wrapped) for n, m in root.named_modules()}
    weights, wants = {}, {}
    for at, root in _roots(model.wrapped):
        for name, x in (*root.named_parameters(), *root.named_buffers()):
            weights[at + name], wants[at + name] = x.detach().clone(), x.requires_grad
    points = model.points.by_name
    active = tuple(n for n, p in points.items() if getattr(p, "hooks", None) or _has_hooks(p))
    with torch.no_grad():
        numbers = output().detach().clone()
    return Snapshot(
        weights,
        {n: m.training for n, m in named.items()},
        wants,
        {n: ids for n, m in named.items() if any(ids := _hook_ids(m))},
        {n: type(m) for n, m in named.items()},
        active,
        torch_is_set,
        numbers,
    )


@contextmanager
def stays(model: Any, output: Callable[[], Tensor]) -> Iterator[None]:
    """Whatever happens inside, the model is the same afterwards."""
    before = snapshot(model, output)
    try:
        yield
    finally:
        assert snapshot(model, output).changes(before) == []


def _roots(wrapped: Any) -> list[tuple[str, nn.Module]]:
    if isinstance(wrapped, nn.Module):
        return [("", wrapped)]
    return [(f"{n}.", m) for n, m in wrapped.components.items() if isinstance(m, nn.Module)]


def _hook_ids(module: nn.Module) -> tuple[int, ...]:
    kinds = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return tuple(id(hook) for hooks in kinds for hook in hooks.values())


def _has_hooks(point: Any) -> bool:
    return bool(getattr(point, "_forward_hooks", None) or getattr(point, "_backward_hooks", None))


def _torch_is_set() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu"),
        torch._C._len_torch_function_stack(),
    )


def _same(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and one.shape == other.shape and torch.equal(_bits(one), _bits(other))


def _bits(x: Tensor) -> Tensor:
    return torch.nan_to_num(x) if x.is_floating_point() else x
