"""The other road: sites read and edited by torch's own hooks, on a model this package never touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

Change = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class Probe:
    """Where a site's value is in the library's own model.

    `path` is a module's. The value is its first input or its output, of a tuple the `item`-th; with
    `heads`, its last axis is [head x d_head]. `loop` says whether a sampling loop calls it, `per_step` how
    often a step does (the last may do less), `needs` which inputs it runs with.
    """

    site: str
    path: str
    side: Literal["in", "out"] = "out"
    heads: int | None = None
    item: int = 0
    loop: bool = False
    needs: str = ""
    per_step: int = 1

    def of(self, value: Any) -> Tensor:
        tensor = value if isinstance(value, Tensor) else value[self.item]
        return tensor.unflatten(-1, (self.heads, -1)) if self.heads else tensor

    def put(self, value: Any, new: Tensor) -> Any:
        new = new.flatten(-2) if self.heads else new
        if isinstance(value, Tensor):
            return new
        return type(value)((*value[: self.item], new, *value[self.item + 1 :]))


def find(plain: Any, path: str) -> nn.Module:
    """A module of a model, or of one of a pipeline's."""
    if isinstance(plain, nn.Module):
        return plain.get_submodule(path)
    part, _, rest = path.partition(".")
    return getattr(plain, part).get_submodule(rest)


def _attach(module: nn.Module, probe: Probe, do: Callable[[Tensor], Tensor | None]) -> Any:
    def after(module: nn.Module, args: Any, output: Any) -> Any:
        new = do(probe.of(output))
        return None if new is None else probe.put(output, new)

    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        name = None if args else next(iter(kwargs))
        value = args[0] if name is None else kwargs[name]
        new = do(probe.of(value))
        if new is None:
            return None
        put = probe.put(value, new)
        return ((put, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: put})

    if probe.side == "out":
        return module.register_forward_hook(after)
    return module.register_forward_pre_hook(before, with_kwargs=True)


@contextmanager
def watched(
    plain: Any, watch: Sequence[Probe], change: Sequence[tuple[Probe, Change]] = ()
) -> Iterator[dict[str, list[Tensor]]]:
    """The values at the probes, call by call, after the changes.

    A change is given the number of the call and the value, which it must not write into.
    """
    seen: dict[str, list[Tensor]] = {probe.site: [] for probe in watch}

    def changer(fn: Change) -> Callable[[Tensor], Tensor]:
        calls = iter(range(10**6))
        return lambda value: fn(next(calls), value)

    def keeper(probe: Probe) -> Callable[[Tensor], Tensor | None]:
        def keep(value: Tensor) -> Tensor | None:
            seen[probe.site].append(value)
            # Of a view the model must go on with the view, or nothing can be derived with respect to it.
            return value if probe.heads else None

        return keep

    with ExitStack() as stack:
        for probe, fn in change:
            stack.callback(_attach(find(plain, probe.path), probe, changer(fn)).remove)
        for probe in watch:
            stack.callback(_attach(find(plain, probe.path), probe, keeper(probe)).remove)
        yield seen
