"""A model's sites as locations of nnsight's interleaver: read, edited and counted as its own are.

nnsight hands every module's input and output to its interleaver. At those of them where a site can
be read, a `SiteAtModule` turns the module's tensor into the site's value by the readers that the
TransformerLens engine uses too, and offers it to the interleaver under the site's own location. It
does so on demand, when a request for that value is pending or a hook is active on it: a pass-through is
only counted, and the model keeps its fused attention.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mm_adapters._errors import AttentionUnreachableError
from mm_adapters.hooks.attention import KERNELS
from mm_adapters.hooks.kept import CarryResidual, Keep
from mm_adapters.hooks.module_hooks import AttentionHook, ModuleHook
from mm_adapters.hooks.point import PointHook, check_like
from mm_adapters.hooks.readers import Reader, ResidualReader
from mm_adapters.nnsight_engine.protocol import Interleaving
from mm_adapters.records.spec import Site

Hook = Callable[..., Tensor | None]
ROOT = "sites"


class TracedPoint:
    """Where one site's values pass: nnsight's blocks are served first, then a run's hooks."""

    # Readers fire a point only if it is live. Whether a value is requested is asked when it passes.
    live = True

    def __init__(self, site: Site, engine: Interleaving) -> None:
        self.site = site
        self.path = f"{ROOT}.{site.name}"
        self.location = f"{self.path}.output"
        self.module_hooks: list[PointHook] = []
        self.hooks: dict[int, Hook] = {}
        self._engine = weakref.ref(engine)

    @property
    def engine(self) -> Interleaving:
        """The interleaver of its model."""
        engine = self._engine()
        assert engine is not None
        return engine

    @property
    def requested(self) -> bool:
        """Whether a request for this value is pending, or a hook is active on it."""
        if self.hooks:
            return True
        engine, location = self.engine, self.location
        return (location in engine.parked or location in engine.observers) and engine.is_requested(location)

    def __call__(self, value: Tensor) -> Tensor:
        given = value
        value = self.engine.handle(self.location, value)
        if value is not given:
            check_like(self.site.name, given, value)
        if self.hooks:
            with self.engine.serving():
                for hook in list(self.hooks.values()):
                    new = hook(self, (value,), value)
                    value = value if new is None else new
        return value

    def register_forward_hook(self, hook: Hook) -> Handle:
        """As a module's: `hook(point, (value,), value)` may return a new value.

        Raises: ModelStateError if the model is in a state in which the site cannot be watched.
        """
        self.check()
        handle = Handle(self)
        self.hooks[id(handle)] = hook
        self.engine.update_hooks(self)
        return handle

    def check(self) -> None:
        """Raises: ModelStateError if the model is in a state in which the site cannot be watched."""
        for module_hook in self.module_hooks:
            module_hook.check()

    def move(self, site: Site) -> None:
        """Leaves its module hooks, for the model has other modules now; those of the site are added next."""
        self.site = site
        self.module_hooks = []

    def refresh(self) -> None:
        """Does nothing: there is no torch hook to put on or take off."""


class Handle:
    """Takes one hook off its point."""

    def __init__(self, point: TracedPoint) -> None:
        self._point = point

    def remove(self) -> None:
        self._point.hooks.pop(id(self), None)
        self._point.engine.update_hooks(self._point)


class OnDemand:
    """Runs a reader if one of its points is requested, and else drops what was kept for it."""

    live = True

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.points: tuple[Any, ...] = reader.points

    def __call__(self, x: Tensor) -> Tensor:
        for point in self.points:
            if point.requested:
                return self.reader(x)
        self.points[0].engine.count_passed(self.points)
        reader = self.reader
        if reader.kept is None:
            return x
        base, reader.kept.value = reader.kept.value, None
        if isinstance(reader, ResidualReader):
            for other in reader.next_in_stream:
                assert base is not None
                other.kept.value = base + x
        return x


class Always:
    """Runs a `Keep` whether or not its consumer is requested."""

    live = True

    def __init__(self, keep: Keep[Any]) -> None:
        self.keep = keep

    def __call__(self, x: Tensor) -> Tensor:
        return self.keep(x)


class SiteAtModule:
    """What is done at one module's input or output before and after nnsight's own blocks see it."""

    def __init__(self, module_hook: ModuleHook) -> None:
        self.module_hook = module_hook
        module_hook.readers = [  # type: ignore[assignment]
            Always(r) if isinstance(r, Keep) else OnDemand(r) for r in module_hook.readers
        ]
        self.points: list[TracedPoint] = [p for r in module_hook.readers for p in getattr(r, "points", ())]
        self.keeps = [
            (r.keep, slot)
            for r, slot in zip(module_hook.readers, module_hook.slots, strict=True)
            if isinstance(r, Always)
        ]
        self.readers = [r.reader for r in module_hook.readers if isinstance(r, OnDemand)]
        self.drops = [r.kept for r in self.readers if r.kept is not None]
        self.only_counts = not (self.keeps or self.drops)
        # What moves on in the stream is carried out of a module, and added to a branch, at every pass.
        self.always_active = any(isinstance(keep, CarryResidual) for keep, _ in self.keeps) or any(
            isinstance(r, ResidualReader) and r.next_in_stream for r in self.readers
        )

    def __call__(self, value: Any, engine: Interleaving) -> Any:
        """The value (an output, or args and kwargs) with the edits of the sites in it."""
        if not self.always_active and not self._is_requested(engine):
            engine.count_passed(self.points)
            self.pass_through(value)
            return value
        if self.module_hook.side == "input":
            args, kwargs = value
            new = self.module_hook.on_input(self.module_hook.module, args, kwargs)
        else:
            new = self.module_hook.on_output(self.module_hook.module, (), value)
        return value if new is None else new

    def pass_through(self, value: Any) -> None:
        """Keeps of a value that is not requested what a reader behind this module may need."""
        for kept in self.drops:
            kept.value = None
        for keep, slot in self.keeps:
            keep(self.module_hook.shown(value, slot))

    def _is_requested(self, engine: Interleaving) -> bool:
        parked, observers = engine.parked, engine.observers
        for point in self.points:
            if point.hooks or point.location in parked or point.location in observers:
                return True
        return False


class AttentionGate(TorchFunctionMode):
    """Active in one attention module's forward; lets an `AttentionInterceptor` take the attention call.

    `late` says that it was opened when the module had begun, at the request of a block.
    """

    def __init__(self, module_hook: AttentionHook, engine: Interleaving, late: bool) -> None:
        super().__init__()
        self.module_hook = module_hook
        self.engine = engine
        self.late = late
        self.points: dict[str, Any] = module_hook.points  # Each is a TracedPoint, as this engine makes them.
        self.interceptor = module_hook.interceptor(self._fire, self._is_requested)
        self.n_attended = 0
        self.fired: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A block's or a hook's own torch calls, made while the model stands still, are not the model's.
        if func is torch.split and not self.n_attended and not self.engine.is_serving:
            return self.interceptor.__torch_function__(func, types, args, kwargs)
        if func in KERNELS and self.n_attended < self.module_hook.n_calls and not self.engine.is_serving:
            self.interceptor.calls = self.n_attended
            self.n_attended += 1
            if self.interceptor.lengths or any(p.requested for p in self.points.values()):
                return self.interceptor.__torch_function__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))

    def close(self) -> set[str]:
        """Leaves; returns the names of the values that were fired.

        Raises: AttentionUnreachableError if a value was requested and no attention call could be taken.
        """
        self.__exit__(None, None, None)
        requested = [p.site.name for p in self.points.values() if p.requested]
        if requested and not self.n_attended and not self.late:
            kind = type(self.module_hook.module).__name__
            raise AttentionUnreachableError(
                f"{', '.join(requested)}: {kind} attended with a kernel that "
                'cannot be watched. Load the model with attn_implementation="sdpa" or "eager" '
                "(transformers), or set its attention backend to native (diffusers)."
            )
        return self.fired

    def _fire(self, name: str, x: Tensor) -> Tensor:
        if not self._is_requested(name):
            return x
        self.fired.add(name)
        return self.points[name](x)

    def _is_requested(self, name: str) -> bool:
        point = self.points.get(name)
        return point is not None and point.requested
