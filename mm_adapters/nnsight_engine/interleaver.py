"""nnsight's interleaver with sites in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from greenlet import getcurrent
from nnsight.intervention.interleaver import Event, Mediator, OutOfOrderError

from mm_adapters._errors import InputError
from mm_adapters.hooks.kept import Kept
from mm_adapters.hooks.module_hooks import AttentionHook, ModuleHook
from mm_adapters.hooks.set_aside import hooks_set_aside
from mm_adapters.nnsight_engine.batcher import RowBatcher
from mm_adapters.nnsight_engine.fast_path import FastPathInterleaver, LocationState
from mm_adapters.nnsight_engine.points import ROOT, AttentionGate, SiteAtModule, TracedPoint
from mm_adapters.nnsight_engine.protocol import ServedPoint

STEP = "step"
END = "the run has ended"


class SiteInterleaver(FastPathInterleaver):
    """An interleaver that knows sites: they are derived from the locations that nnsight hands it.

    nnsight gives every module a forward of its own, which hands input and output to `handle`. What a
    `SiteAtModule` derives from them is handed to `handle` again, as the site's location. Where nothing is
    requested, which is nearly everywhere in most runs, values pass through.
    """

    def __init__(self) -> None:
        super().__init__()
        self.points: dict[str, TracedPoint] = {}
        self.is_serving = False
        self._always_active: set[str] = set()
        self._gates: list[AttentionGate] = []
        self._loop = ""
        self._marks = {"result"}
        # Of each site, the modules' locations at which its value is taken.
        self._sources: dict[str, list[str]] = {}
        self._kept: list[Kept[Any]] = []
        # The points with hooks, and where more is done than to count in this whole run.
        self._hooked: set[str] = set()
        self._active_all_run = {"result"}
        self.active.add("result")
        self._sites_parked = False

    def attach_sites(self, points: dict[str, TracedPoint], module_hooks: list[ModuleHook], loop: Any) -> None:
        """Derives sites at the hooks' modules; `loop` is the module that is called once a step."""
        self._leave_sites()
        self.points = {p.location: p for p in points.values()}
        for module_hook in module_hooks:
            path = self.envoys[id(module_hook.module)].path
            if isinstance(module_hook, AttentionHook):
                ends = [f"{path}.input", f"{path}.output"]
                enter, leave = (self.location_states.setdefault(end, LocationState()) for end in ends)
                enter.enters = leave.leaves = module_hook
                enter.add((), more=True)
                leave.add(module_hook.points.values(), more=True)
                fed: Iterable[Any] = module_hook.points.values()
            else:
                ends = [f"{path}.{module_hook.side}"]
                at_module = SiteAtModule(module_hook)
                location_state = self.location_states.setdefault(ends[0], LocationState())
                location_state.at_module = at_module
                location_state.add(at_module.points, more=not at_module.only_counts)
                self._kept += [keep.kept for keep, _ in at_module.keeps]
                if at_module.always_active:
                    self._always_active.add(ends[0])
                fed = at_module.points
            for point in fed:
                self._sources.setdefault(point.location, []).extend(ends)  # type: ignore[attr-defined]
        if loop is not None:
            self._loop = self.envoys[id(loop)].path
            self._marks.add(f"{self._loop}.input")
        self.sides.clear()
        self._activate(self._marks | self._always_active)

    def _leave_sites(self) -> None:
        """Forgets what it derived at modules that the model has no more."""
        self.location_states.clear()
        self.active = {"result"}
        self._active_all_run = {"result"}
        self._marks = {"result"}
        self._always_active.clear()
        self._sources.clear()
        self._kept.clear()
        self._loop = ""

    def update_hooks(self, point: ServedPoint) -> None:
        """Notes whether a point has hooks; called when it is given one, or loses one."""
        if point.hooks:
            self._hooked.add(point.location)
            self._activate(self._sources.get(point.location, ()))
        else:
            self._hooked.discard(point.location)

    def _activate(self, locations: Iterable[str]) -> None:
        self._active_all_run.update(locations)
        self.active.update(locations)

    def reindex(self) -> None:
        super().reindex()
        self._active_all_run = self._marks | self._always_active
        for location in (*self.observers, *self._hooked):
            self._active_all_run.update((location, *self._sources.get(location, ())))
        self._active_all_run.update(self._exit(gate.module_hook) for gate in self._gates)
        self.active |= self._active_all_run

    def _reindex_parked(self) -> None:
        super()._reindex_parked()
        self.active = self._active_all_run | self.parked
        self._sites_parked = not self._sources.keys().isdisjoint(self.parked)
        if self._sites_parked:
            for location in self.parked:
                self.active.update(self._sources.get(location, ()))

    def count_passed(self, points: Iterable[ServedPoint]) -> None:
        """Counts values that were not requested: a block may request later ones by their number."""
        self.passed.append(tuple(point.location for point in points))

    def is_requested(self, location: str) -> bool:
        """Whether a block's request for this visit of a location is pending, or a cache keeps it."""
        return location in self.observers or (location in self.parked and bool(self._ready(location)))

    def check_request(self, point: TracedPoint) -> None:
        """Checks a block's request for a site before it is made.

        Raises: OutOfOrderError if the model has come past it; InputError outside a trace; ModelStateError if
        the model is in a state in which the site cannot be watched.
        """
        mediator = current(point.site.name)
        point.check()
        if mediator.iteration == 0 and mediator.occurrence(point.location) > 0:
            raise OutOfOrderError(_too_late(point.site.name, mediator))
        if isinstance(self.batcher, RowBatcher):
            self.batcher.check_rows(mediator.batch_group, point.location, point.site.name)

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Modules run inside as outside a trace: another engine has a run in the middle of this one's."""
        before, self.interleaving = self.interleaving, False
        modules = [envoy._module for envoy in self.envoys.values()]
        try:
            with hooks_set_aside(modules):
                yield
        finally:
            self.interleaving = before

    @contextmanager
    def serving(self) -> Iterator[None]:
        """The model waits inside, while a block's or a hook's own code runs."""
        before, self.is_serving = self.is_serving, True
        try:
            yield
        finally:
            self.is_serving = before

    def handle(self, provider: str, value: Any) -> Any:
        if provider in self.active:
            return self._handle(provider, value)
        location_state = self.location_states.get(provider)
        if location_state is None:
            self.passed.append((provider,))
            return value
        self.passed.append((provider, *location_state.counted))
        if location_state.more:
            location_state.pass_through(value, self.entered)
        return value

    def _handle(self, provider: str, value: Any) -> Any:
        location_state = self.location_states.get(provider)
        if provider == "result":
            self._end_loops()
        elif provider in self._marks:
            self._offer(STEP, None)
        if location_state is not None and location_state.leaves is not None:
            self._leave(location_state.leaves)
        value = self._offer(provider, value)
        if location_state is None:
            return value
        if location_state.at_module is not None:
            value = location_state.at_module(value, self)
        module_hook = location_state.enters
        if module_hook is not None:
            self.entered[id(module_hook)] = module_hook
            if any(p.requested for p in module_hook.points.values()):  # type: ignore[attr-defined]
                self._open(module_hook, late=False)
        return value

    def check_dangling_mediators(self) -> None:
        """As nnsight's, where a request was not met; but it is always an error.

        nnsight 0.8.1 (intervention/interleaver.py, dangling_unwind) only warns when that happened
        in a loop over steps, and what follows the loop in the block is not run.
        """
        for mediator in self.mediators:
            if not mediator.alive or mediator.pending is None or mediator.pending.provider is None:
                continue
            _throw(mediator, OutOfOrderError(self._reason_unmet(mediator)))
        super().check_dangling_mediators()

    def __enter__(self) -> SiteInterleaver:
        batcher = self.batcher
        if batcher is not None and not isinstance(batcher, RowBatcher):  # A part of a model is traced.
            refuse_remote(batcher.envoy.path, batcher.kwargs)
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> bool:
        while self._gates:
            self._gates.pop().__exit__(None, None, None)
        self.entered.clear()
        self.is_serving = False
        for kept in self._kept:
            kept.value = None
        return super().__exit__(*exc)

    def _offer(self, provider: str, value: Any) -> Any:
        if provider not in self.parked and provider not in self.observers:
            self.passed.append((provider,))
            return value
        if isinstance(self.batcher, RowBatcher) and self.batcher.batching:
            self.batcher.locate(provider)
        for mediator in self._ready(provider):
            mediator.__dict__["last"] = provider
        before, self.is_serving = self.is_serving, True
        try:
            value = super().handle(provider, value)
        finally:
            self.is_serving = before
        if self._sites_parked and self.entered:
            self._open_late()
        for mediator in self.mediators:
            step, pending = mediator.__dict__.get("step"), mediator.pending
            if step is None or pending is None or pending.iteration is None:
                continue
            if pending.iteration > step and self._in_loop(pending.provider):
                # nnsight would take this for the next step's, and say nothing.
                _throw(mediator, OutOfOrderError(_too_late(_name_of(str(pending.provider)), mediator)))
        return value

    def _open_late(self) -> None:
        """Opens an attention module that had begun when a block requested a value inside it."""
        for mediator in self.mediators:
            pending = mediator.pending
            point = self.points.get(str(pending.provider)) if pending is not None else None
            for module_hook in point.module_hooks if point is not None else ():
                inside = isinstance(module_hook, AttentionHook) and id(module_hook) in self.entered
                if inside and not any(gate.module_hook is module_hook for gate in self._gates):
                    self._open(module_hook, late=True)  # type: ignore[arg-type]

    def _in_loop(self, provider: str | None) -> bool:
        if provider is None or not self._loop:
            return False
        point = self.points.get(provider)
        path = provider if point is None else self._home(point)
        return path == self._loop or path.startswith(f"{self._loop}.")

    def _home(self, point: TracedPoint) -> str:
        return self.envoys[id(point.module_hooks[0].module)].path if point.module_hooks else ""

    def _open(self, module_hook: AttentionHook, late: bool) -> None:
        gate = AttentionGate(module_hook, self, late)
        self._gates.append(gate)
        gate.__enter__()
        self._activate([self._exit(module_hook)])

    def _exit(self, module_hook: ModuleHook) -> str:
        return f"{self.envoys[id(module_hook.module)].path}.output"

    def _leave(self, module_hook: AttentionHook) -> None:
        self.entered.pop(id(module_hook), None)
        not_fired = module_hook.points
        if self._gates and self._gates[-1].module_hook is module_hook:
            fired = self._gates.pop().close()
            not_fired = {name: point for name, point in not_fired.items() if name not in fired}
        self.count_passed(not_fired.values())  # type: ignore[arg-type]

    def _end_loops(self) -> None:
        moved = False
        for mediator in self.mediators:
            while mediator.alive and mediator.pending is not None and mediator.pending.provider == STEP:
                # A sandbox hands back what it read, as if it had been written into.
                reply = (END,) if mediator.pending.event is Event.VALUE else ()
                mediator.pending = mediator.switch(*reply)
                moved = True
        if moved:
            self._reindex_parked()

    def _reason_unmet(self, mediator: Mediator) -> str:
        assert mediator.pending is not None
        provider = str(mediator.pending.provider)
        ran, step = mediator.occurrence(provider), mediator.pending.iteration or 0
        name = _name_of(provider)
        if not ran:
            return f"{name} was asked for, and this run never came by there. Do the inputs use it?"
        if step:
            return (
                f"{name} was asked for at step {step}, and it ran {_times(ran)} in this run. Ask for "
                "what does not run at every step before the loop over steps, or after it."
            )
        return _too_late(name, mediator)


def current(what: str) -> Mediator:
    """The worker of the block that runs. Raises: InputError outside a trace."""
    mediator: Callable[[], Mediator] | None = getattr(getcurrent(), "mediator", None)
    if mediator is None:
        raise InputError(f"{what} has a value only inside `with model.trace(...):`.")
    return mediator()


def _throw(mediator: Mediator, error: Exception) -> None:
    """Raises `error` at the block's line whose request is pending."""
    assert mediator.worker is not None
    mediator.worker.parent = getcurrent()
    mediator.pending = None
    mediator.worker.throw(error)


def _too_late(name: str, mediator: Mediator) -> str:
    last = mediator.__dict__.get("last")
    since = f" This block had gone on to {_name_of(last)}, which runs after it." if last else ""
    return (
        f"{name} had run already when it was asked for.{since} Ask in the order things run, or in a "
        "block of its own: `with tracer.invoke():`."
    )


def _name_of(provider: str) -> str:
    is_site = provider.startswith(f"{ROOT}.")
    return provider.removeprefix(f"{ROOT}.").removesuffix(".output") if is_site else provider


def _times(n: int) -> str:
    return "once" if n == 1 else f"{n} times"


def refuse_remote(path: str, arguments: dict[str, Any]) -> None:
    """Takes `remote=` out of the arguments of a part's run. Raises: InputError if it asks for a service."""
    if arguments.pop("remote", False):
        raise InputError(
            f"{path} is a part of a model, and NDIF runs whole models. Trace the model, "
            "`with model.trace(..., remote=True):`, and read this part inside."
        )
