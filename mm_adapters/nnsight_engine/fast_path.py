"""The pass-through of a module in a trace: it costs little more than the module's own forward."""

from __future__ import annotations

from typing import Any

from nnsight.intervention.interleaver import Interleaver
from nnsight.intervention.source import Controller, run_body

from mm_adapters.hooks.module_hooks import AttentionHook
from mm_adapters.nnsight_engine.points import SiteAtModule


class LocationState:
    """What is done at a location besides what nnsight does.

    In a pass-through the sites at `counted` are counted; `more` says whether that is not all.
    """

    __slots__ = ("at_module", "counted", "enters", "leaves", "more")

    def __init__(self) -> None:
        self.at_module: SiteAtModule | None = None
        self.enters: AttentionHook | None = None
        self.leaves: AttentionHook | None = None
        self.counted: list[str] = []
        self.more = False

    def add(self, points: Any, more: bool) -> None:
        """Counts these points too in a pass-through; `more` if that is not all that is done for them."""
        self.counted += [point.location for point in points]
        self.more = self.more or more

    def feeds_only(self, end: LocationState | None) -> bool:
        """Whether all that is done here is to keep values for readers at `end`, the same module's output, and
        all that a pass-through does there is to drop just those."""
        here, there = self.at_module, None if end is None else end.at_module
        if here is None or there is None or end is None or here.drops or there.keeps:
            return False
        if any(module_hook is not None for module_hook in (self.enters, self.leaves, end.enters, end.leaves)):
            return False
        return {keep.kept for keep, _ in here.keeps} == set(there.drops)

    def pass_through(self, value: Any, entered: dict[int, AttentionHook]) -> None:
        """Does what readers behind this location may need of a value that is not requested here."""
        if self.at_module is not None:
            self.at_module.pass_through(value)
        if self.enters is not None:
            entered[id(self.enters)] = self.enters
        elif self.leaves is not None:
            entered.pop(id(self.leaves), None)


# The locations that are counted when a module's side is passed, and what is done besides.
Side = tuple[tuple[str, ...], LocationState | None]


def _side(locations: tuple[str, ...], location_state: LocationState | None) -> Side:
    if location_state is None:
        return locations, None
    return (*locations, *location_state.counted), location_state if location_state.more else None


class FastPathInterleaver(Interleaver):
    """Notes by module what is passed through, and counts it when a count is read.

    nnsight hands over a module's input, its gate and its output one by one, and counts each: that is most of
    what a trace costs beside the model. `active` are the locations where more is done than to count.
    """

    def __init__(self) -> None:
        self.active: set[str] = set()
        self.location_states: dict[str, LocationState] = {}
        self.entered: dict[int, AttentionHook] = {}
        self.sides: dict[str, tuple[Side, Side, Side]] = {}
        self.passed: list[tuple[str, ...]] = []
        self._counts: dict[str, int] = {}
        super().__init__()

    @property
    def counts(self) -> dict[str, int]:  # type: ignore[override]
        """How many times each location has been passed since the first of the running blocks started."""
        counts = self._counts
        if self.passed:
            for locations in self.passed:
                for location in locations:
                    counts[location] = counts.get(location, 0) + 1
            self.passed.clear()
        return counts

    @counts.setter
    def counts(self, counts: dict[str, int]) -> None:
        self.passed.clear()
        self._counts = counts

    def __enter__(self) -> FastPathInterleaver:
        # A block counts from where it starts; if none has started, earlier counts are of no use.
        if all(mediator.worker is None for mediator in self.mediators):
            self.counts = {}
        super().__enter__()
        return self

    def instrument(self, envoy: Any) -> None:
        super().instrument(envoy)
        forward = envoy._module.__dict__.get("forward")
        if type(forward) is Controller:
            envoy._module.__dict__["forward"] = FastPathController(envoy._module, forward.state)

    def sides_of(self, locations: tuple[str, str, str], is_leaf: bool) -> tuple[Side, Side, Side]:
        """What is passed at a module, made at its first call: before it, before it if its output is active,
        and after it."""
        begin, gate, end = locations
        location_states = self.location_states.get(begin), self.location_states.get(end)
        before, after = _side((begin, gate), location_states[0]), _side((end,), location_states[1])
        before_active = before
        if is_leaf and location_states[0] is not None and location_states[0].feeds_only(location_states[1]):
            # No request for its output can be made while it runs: none of our code runs inside a leaf.
            before, after = (before[0], None), (after[0], None)
        self.sides[begin] = before, before_active, after
        return before, before_active, after


class FastPathController(Controller):
    """A module's forward in a trace, as nnsight's: it checks once, not three times, whether it is active."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        state, module = self.state, self.module_ref()
        engine, _, locations = state.active()
        if not isinstance(engine, FastPathInterleaver) or state.sourced:
            return super().__call__(*args, **kwargs)
        begin, gate, end = locations
        active = engine.active
        if begin in active or gate in active:
            return super().__call__(*args, **kwargs)
        sides = engine.sides.get(begin)
        if sides is None:
            assert module is not None
            sides = engine.sides_of(locations, is_leaf=next(module.children(), None) is None)
        passed, location_state = sides[1] if end in active else sides[0]
        engine.passed.append(passed)
        if location_state is not None:
            location_state.pass_through((args, kwargs), engine.entered)
        output = run_body(state, module, args, kwargs)
        if end in engine.active:
            return engine.handle(end, output)
        passed, location_state = sides[2]
        engine.passed.append(passed)
        if location_state is not None:
            location_state.pass_through(output, engine.entered)
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> FastPathController:
        copied = super().__deepcopy__(memo)
        return FastPathController(copied.module_ref(), copied.state)

    def __reduce__(self) -> tuple[Any, ...]:
        return FastPathController, super().__reduce__()[1]
