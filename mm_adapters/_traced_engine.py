"""nnsight's interleaver with sites in it, and loops over steps that end when the run ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

from greenlet import getcurrent
from nnsight.intervention.editing import EditingTracer
from nnsight.intervention.interleaver import Event, Interleaver, Mediator, OutOfOrderError
from nnsight.intervention.iterator import Iterations
from nnsight.intervention.tracer import InterleavingTracer

from mm_adapters._taps import AttentionTap, Tap
from mm_adapters._traced_points import ROOT, Gate, Station, TracedPoint
from mm_adapters._traced_rows import RowBatcher

STEP = "step"
END = "the run has ended"


class SiteInterleaver(Interleaver):
    """An interleaver that knows sites: they are derived from the locations that nnsight hands it.

    nnsight gives every module a forward of its own, which hands input and output to `handle`. What a
    `Station` finds there is handed to `handle` again, as the site's location.
    """

    def __init__(self) -> None:
        super().__init__()
        self.points: dict[str, TracedPoint] = {}
        self.is_serving = False
        self._stations: dict[str, list[Station]] = {}
        self._attention: dict[str, AttentionTap] = {}
        self._entered: dict[int, AttentionTap] = {}
        self._gates: list[Gate] = []
        self._loop = ""
        self._marks = {"result"}
        # Where there is anything to do besides what nnsight does: few of all locations.
        self._places = {"result"}

    def serve(self, points: dict[str, TracedPoint], taps: list[Tap], loop: Any) -> None:
        """Puts stations at the taps' modules; `loop` is the module that is called once a step."""
        self.points = {p.location: p for p in points.values()}
        for tap in taps:
            path = self.envoys[id(tap.module)].path
            if isinstance(tap, AttentionTap):
                self._attention[f"{path}.input"] = self._attention[f"{path}.output"] = tap
            else:
                self._stations.setdefault(f"{path}.{tap.side}", []).append(Station(tap))
        if loop is not None:
            self._loop = self.envoys[id(loop)].path
            self._marks.add(f"{self._loop}.input")
        self._places = {*self._stations, *self._attention, *self._marks}

    def awaits(self, location: str) -> bool:
        """Whether a block waits for this visit of a location, or a cache keeps it."""
        return location in self.observers or (location in self.parked and bool(self._ready(location)))

    def ask(self, point: TracedPoint) -> None:
        """A block is about to wait for a site.

        Raises: OutOfOrderError if the model has come past it; ValueError outside a trace.
        """
        mediator = current(point.site.name)
        if mediator.iteration == 0 and mediator.occurrence(point.location) > 0:
            raise OutOfOrderError(_too_late(point.site.name, mediator))
        if isinstance(self.batcher, RowBatcher):
            self.batcher.check_rows(mediator.batch_group, point.location, point.site.name)

    @contextmanager
    def serving(self) -> Iterator[None]:
        """While the model stands still and somebody else's code runs."""
        was, self.is_serving = self.is_serving, True
        try:
            yield
        finally:
            self.is_serving = was

    def handle(self, provider: str, value: Any) -> Any:
        if provider not in self._places:
            if provider in self.parked or provider in self.observers:
                return self._serve(provider, value)
            counts = self.counts
            counts[provider] = counts.get(provider, 0) + 1
            return value
        stations = self._stations.get(provider, ())
        tap = self._attention.get(provider)
        if provider == "result":
            self._end_loops()
        elif provider in self._marks:
            self._serve(STEP, None)
        leaving = tap if tap is not None and id(tap) in self._entered else None
        if leaving is not None:
            self._leave(leaving)
        value = self._serve(provider, value)
        for station in stations:
            value = station(value)
        if tap is not None and leaving is None:
            self._entered[id(tap)] = tap
            if any(p.due for p in tap.points.values()):  # type: ignore[attr-defined]
                self._open(tap, late=False)
        return value

    def check_dangling_mediators(self) -> None:
        """As nnsight's, where a block asked for what did not come; but it is always an error.

        nnsight 0.8.1 (intervention/interleaver.py, dangling_unwind) only warns when that happened
        in a loop over steps, and what follows the loop in the block is not run.
        """
        for mediator in self.mediators:
            if not mediator.alive or mediator.pending is None or mediator.pending.provider is None:
                continue
            _throw(mediator, OutOfOrderError(self._why_not(mediator)))
        super().check_dangling_mediators()

    def __exit__(self, *exc: Any) -> bool:
        while self._gates:
            self._gates.pop().__exit__(None, None, None)
        self._entered.clear()
        self.is_serving = False
        for station in chain.from_iterable(self._stations.values()):
            station.reset()
        return super().__exit__(*exc)

    def _serve(self, provider: str, value: Any) -> Any:
        if provider not in self.parked and provider not in self.observers:
            self.counts[provider] = self.counts.get(provider, 0) + 1
            return value
        if isinstance(self.batcher, RowBatcher):
            self.batcher.locate(provider)
        for mediator in self._ready(provider):
            mediator.__dict__["last"] = provider
        with self.serving():
            value = super().handle(provider, value)
        if self._entered:
            self._open_late()
        for mediator in self.mediators:
            step, pending = mediator.__dict__.get("step"), mediator.pending
            if step is None or pending is None or pending.iteration is None:
                continue
            if pending.iteration > step and self._in_loop(pending.provider):
                # nnsight would take this for the next step's, and say nothing.
                _throw(mediator, OutOfOrderError(_too_late(_shown(str(pending.provider)), mediator)))
        return value

    def _open_late(self) -> None:
        """Opens an attention module that had begun when a block came to wait for what is inside."""
        for mediator in self.mediators:
            pending = mediator.pending
            point = self.points.get(str(pending.provider)) if pending is not None else None
            for tap in point.taps if point is not None else ():
                inside = isinstance(tap, AttentionTap) and id(tap) in self._entered
                if inside and not any(gate.tap is tap for gate in self._gates):
                    self._open(tap, late=True)  # type: ignore[arg-type]

    def _in_loop(self, provider: str | None) -> bool:
        if provider is None or not self._loop:
            return False
        point = self.points.get(provider)
        path = provider if point is None else self._home(point)
        return path == self._loop or path.startswith(f"{self._loop}.")

    def _home(self, point: TracedPoint) -> str:
        return self.envoys[id(point.taps[0].module)].path if point.taps else ""

    def _open(self, tap: AttentionTap, late: bool) -> None:
        gate = Gate(tap, self, late)
        self._gates.append(gate)
        gate.__enter__()

    def _leave(self, tap: AttentionTap) -> None:
        del self._entered[id(tap)]
        fired: set[str] = set()
        if self._gates and self._gates[-1].tap is tap:
            fired = self._gates.pop().close()
        for name, point in tap.points.items():
            if name not in fired:
                point.passed()  # type: ignore[attr-defined]

    def _end_loops(self) -> None:
        for mediator in self.mediators:
            while mediator.alive and mediator.pending is not None and mediator.pending.provider == STEP:
                # A sandbox hands back what it read, as if it had been written into.
                told = (END,) if mediator.pending.event is Event.VALUE else ()
                mediator.pending = mediator.switch(*told)
        self._reindex_parked()

    def _why_not(self, mediator: Mediator) -> str:
        assert mediator.pending is not None
        provider = str(mediator.pending.provider)
        ran, wanted = mediator.occurrence(provider), mediator.pending.iteration or 0
        name = _shown(provider)
        if not ran:
            return f"{name} was asked for, and this run never came by there. Do the inputs use it?"
        if wanted:
            return (
                f"{name} was asked for at step {wanted}, and it ran {_times(ran)} in this run. Ask for "
                "what does not run at every step before the loop over steps, or after it."
            )
        return _too_late(name, mediator)


class Steps(Iterations):
    """Steps of a run: a slice ends when the run does, as Python's do; an index must be there.

    nnsight's own loop ends by an error inside the block, so that nothing after it is run.
    """

    def __iter__(self) -> Iterator[int]:
        mediator = current("tracer.iter")
        previous = mediator.iteration, mediator.__dict__.get("step")
        try:
            for step in self._indices():
                if step < 0:
                    raise ValueError(f"Steps are counted from 0; there is no step {step}.")
                mediator.iteration = step
                mediator.__dict__["step"] = None
                if step > 0 and Mediator.value(STEP) == END:
                    if self.must_exist(step):
                        raise IndexError(f"Step {step} was asked for, and this run did not make it.")
                    return
                mediator.__dict__["step"] = step
                yield step
        finally:
            mediator.iteration, mediator.__dict__["step"] = previous

    def __getitem__(self, key: Any) -> Steps:
        if isinstance(key, slice):
            steps = Steps(key.start or 0, key.stop)
            if key.step not in (None, 1):
                raise ValueError("tracer.iter takes no stride. Give the steps: tracer.iter[[0, 2, 4]].")
            steps.open = True
            return steps
        return Steps(steps=list(key) if isinstance(key, list | tuple) else [key])

    open = False

    def must_exist(self, step: int) -> bool:
        """Whether a run without this step is an error."""
        return not self.open


class SiteTracer(InterleavingTracer):
    """nnsight's tracer, with loops over steps that end when the run does."""

    @property
    def iter(self) -> Steps:
        return Steps()


class SiteEditor(EditingTracer):
    """nnsight's editing tracer, with loops over steps that end when the run does."""

    @property
    def iter(self) -> Steps:
        return Steps()


def current(what: str) -> Mediator:
    """The worker that is asking. Raises: ValueError outside a trace."""
    mediator: Callable[[], Mediator] | None = getattr(getcurrent(), "mediator", None)
    if mediator is None:
        raise ValueError(f"{what} has a value only inside `with model.trace(...):`.")
    return mediator()


def _throw(mediator: Mediator, error: Exception) -> None:
    """Raises `error` at the line of the block that is waiting."""
    assert mediator.worker is not None
    mediator.worker.parent = getcurrent()
    mediator.pending = None
    mediator.worker.throw(error)


def _too_late(name: str, mediator: Mediator) -> str:
    last = mediator.__dict__.get("last")
    came = f" This block had gone on to {_shown(last)}, which runs after it." if last else ""
    return (
        f"{name} had run already when it was asked for.{came} Ask in the order things run, or in a "
        "block of its own: `with tracer.invoke():`."
    )


def _shown(provider: str) -> str:
    is_site = provider.startswith(f"{ROOT}.")
    return provider.removeprefix(f"{ROOT}.").removesuffix(".output") if is_site else provider


def _times(n: int) -> str:
    return "once" if n == 1 else f"{n} times"
