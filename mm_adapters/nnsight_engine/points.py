"""A model's sites as locations of nnsight's interleaver: read, edited and counted as its own are.

nnsight hands every module's input and output to its interleaver. At those of them where a site can
be read, a `SiteAtModule` turns the module's tensor into the site's value by the readers that the
TransformerLens engine uses too, and offers it to the interleaver under the site's own location. It
does so on demand, when a block or a hook waits for that value: what nobody waits for is only
counted, and the model keeps its fused attention.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mm_adapters._errors import AttentionUnreachableError
from mm_adapters.hooks.attention import KERNELS
from mm_adapters.hooks.module_hooks import AttentionHook, ModuleHook
from mm_adapters.hooks.readers import (
    CarryResidual,
    ExpandBatch,
    KeepInput,
    NormReader,
    Reader,
    ResidualReader,
)
from mm_adapters.records.spec import Site

if TYPE_CHECKING:
    from mm_adapters.nnsight_engine.interleaver import SiteInterleaver

Hook = Callable[..., Tensor | None]
ROOT = "sites"


class TracedPoint:
    """Where one site's values pass: nnsight's blocks are served first, then a run's hooks."""

    # The readers fire a point only if it is live; one that nobody waits for is never asked.
    live = True

    def __init__(self, site: Site, engine: SiteInterleaver) -> None:
        self.site = site
        self.path = f"{ROOT}.{site.name}"
        self.location = f"{self.path}.output"
        self.module_hooks: list[ModuleHook] = []
        self.hooks: dict[int, Hook] = {}
        self._engine = weakref.ref(engine)

    @property
    def engine(self) -> SiteInterleaver:
        engine = self._engine()
        assert engine is not None
        return engine

    @property
    def due(self) -> bool:
        """Whether somebody waits for this value."""
        if self.hooks:
            return True
        engine, location = self.engine, self.location
        return (location in engine.parked or location in engine.observers) and engine.awaits(location)

    def __call__(self, value: Tensor) -> Tensor:
        value = self.engine.handle(self.location, value)
        if self.hooks:
            with self.engine.serving():
                for hook in list(self.hooks.values()):
                    new = hook(self, (value,), value)
                    value = value if new is None else new
        return value

    def register_forward_hook(self, hook: Hook) -> Handle:
        """As a module's: `hook(point, (value,), value)` may return a new value."""
        handle = Handle(self)
        self.hooks[id(handle)] = hook
        self.engine.watch(self)
        return handle

    def refresh(self) -> None:
        """Nothing: there is no torch hook to put on or take off."""


class Handle:
    """Takes one hook off its point."""

    def __init__(self, point: TracedPoint) -> None:
        self._point = point

    def remove(self) -> None:
        self._point.hooks.pop(id(self), None)
        self._point.engine.watch(self._point)


class OnDemand:
    """A reader that is run when one of its points is due, and else lets go what was kept for it."""

    live = True

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.points: tuple[Any, ...] = reader.points

    def __call__(self, x: Tensor) -> Tensor:
        for point in self.points:
            if point.due:
                return self.reader(x)
        self.points[0].engine.pass_by(self.points)
        match self.reader:
            case NormReader():
                self.reader.source = None
            case ExpandBatch():
                self.reader.like = None
            case ResidualReader():
                base, self.reader.base = self.reader.base, None
                for other in self.reader.kept_for:
                    assert base is not None
                    other.base = base + x
        return x


class Always:
    """A Keep or a Carry, run whether or not its reader is due."""

    live = True

    def __init__(self, inner: KeepInput | CarryResidual) -> None:
        self.inner = inner

    def __call__(self, x: Tensor) -> Tensor:
        return self.inner(x)


# What was kept for a reader, by its kind.
_KEPT = ((NormReader, "source"), (ExpandBatch, "like"), (ResidualReader, "base"))


class SiteAtModule:
    """What is done at one module's input or output before and after nnsight's own blocks see it."""

    def __init__(self, module_hook: ModuleHook) -> None:
        self.module_hook = module_hook
        module_hook.readers = [  # type: ignore[assignment]
            Always(r) if isinstance(r, KeepInput | CarryResidual) else OnDemand(r)
            for r in module_hook.readers
        ]
        self.points: list[TracedPoint] = [p for r in module_hook.readers for p in getattr(r, "points", ())]
        self.keeps = [
            (r.inner, slot)
            for r, slot in zip(module_hook.readers, module_hook.slots, strict=True)
            if isinstance(r, Always)
        ]
        self.readers = [r.reader for r in module_hook.readers if isinstance(r, OnDemand)]
        self.forgets = [(r, name) for r in self.readers for kind, name in _KEPT if isinstance(r, kind)]
        self.only_counts = not (self.keeps or self.forgets)
        # What moves on in the stream is carried out of a module, and added to a branch, whoever waits.
        self.never_idle = any(isinstance(keep, CarryResidual) for keep, _ in self.keeps) or any(
            isinstance(r, ResidualReader) and r.kept_for for r in self.readers
        )

    def __call__(self, value: Any, engine: SiteInterleaver) -> Any:
        """The handed value (an output, or args and kwargs) with what was done to the sites in it."""
        if not self.never_idle and not self._is_asked(engine):
            engine.pass_by(self.points)
            self.pass_by(value)
            return value
        if self.module_hook.side == "input":
            args, kwargs = value
            new = self.module_hook._given(self.module_hook.module, args, kwargs)
        else:
            new = self.module_hook._returned(self.module_hook.module, (), value)
        return value if new is None else new

    def pass_by(self, value: Any) -> None:
        """Keeps of a value that nobody waits for what a reader behind this module would need."""
        for reader, name in self.forgets:
            setattr(reader, name, None)
        for keep, slot in self.keeps:
            keep(self.module_hook.shown(value, slot))

    def _is_asked(self, engine: SiteInterleaver) -> bool:
        parked, observers = engine.parked, engine.observers
        for point in self.points:
            if point.hooks or point.location in parked or point.location in observers:
                return True
        return False


class AttentionGate(TorchFunctionMode):
    """Stands inside one attention module's forward; lets a `AttentionInterceptor` take the call that attends.

    `late` says that it was opened when the module had begun, at the request of a block.
    """

    def __init__(self, module_hook: AttentionHook, engine: SiteInterleaver, late: bool) -> None:
        super().__init__()
        self.module_hook = module_hook
        self.engine = engine
        self.late = late
        self.points: dict[str, Any] = module_hook.points  # TracedPoints, for that is what they were made as.
        self.watch = module_hook.watch(self._fire, self._wants)
        self.n_attended = 0
        self.fired: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A block's or a hook's own torch calls, made while the model stands still, are not the model's.
        if func is torch.split and not self.n_attended and not self.engine.is_serving:
            return self.watch.__torch_function__(func, types, args, kwargs)
        if func in KERNELS and self.n_attended < self.module_hook.n_calls and not self.engine.is_serving:
            self.watch.calls = self.n_attended
            self.n_attended += 1
            if self.watch.lengths or any(p.due for p in self.points.values()):
                return self.watch.__torch_function__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))

    def close(self) -> set[str]:
        """Leaves; gives the names of the values that were shown.

        Raises: AttentionUnreachableError if something was waited for and no call could be watched.
        """
        self.__exit__(None, None, None)
        wanted = [p.site.name for p in self.points.values() if p.due]
        if wanted and not self.n_attended and not self.late:
            raise AttentionUnreachableError(
                f"{', '.join(wanted)}: {type(self.module_hook.module).__name__} attended with a kernel that "
                'cannot be watched. Load the model with attn_implementation="sdpa" or "eager" '
                "(transformers), or set its attention backend to native (diffusers)."
            )
        return self.fired

    def _fire(self, name: str, x: Tensor) -> Tensor:
        if not self._wants(name):
            return x
        self.fired.add(name)
        return self.points[name](x)

    def _wants(self, name: str) -> bool:
        point = self.points.get(name)
        return point is not None and point.due


def tracked(x: Tensor) -> bool:
    """Whether autograd follows this tensor."""
    return x.requires_grad and torch.is_grad_enabled()
