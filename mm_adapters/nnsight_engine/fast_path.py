"""What a module costs in a trace where nobody waits at it: little more than its own forward."""

from __future__ import annotations

from typing import Any

from nnsight.intervention.interleaver import Interleaver
from nnsight.intervention.source import Controller, run_body

from mm_adapters.hooks.module_hooks import AttentionHook
from mm_adapters.nnsight_engine.points import SiteAtModule


class LocationState:
    """What there is to do at a location besides what nnsight does.

    Where nobody waits, the sites at `counted` are counted; `more` says whether that is not all.
    """

    __slots__ = ("at_module", "counted", "enters", "leaves", "more")

    def __init__(self) -> None:
        self.at_module: SiteAtModule | None = None
        self.enters: AttentionHook | None = None
        self.leaves: AttentionHook | None = None
        self.counted: list[str] = []
        self.more = False

    def add(self, points: Any, more: bool) -> None:
        """Counts these points too where nobody waits; `more`: and that is not all there is to do."""
        self.counted += [point.location for point in points]
        self.more = self.more or more

    def feeds_only(self, other: LocationState | None) -> bool:
        """Whether all that is done here is to keep something for readers at the other location, and all that
        is done there where nobody waits is to let go of just that."""
        here, there = self.at_module, None if other is None else other.at_module
        if here is None or there is None or other is None or here.forgets or there.keeps:
            return False
        if any(
            module_hook is not None for module_hook in (self.enters, self.leaves, other.enters, other.leaves)
        ):
            return False
        kept = [keep.reader for keep, _ in here.keeps]
        let_go = [reader for reader, _ in there.forgets]
        return all(reader in there.readers for reader in kept) and all(reader in kept for reader in let_go)

    def pass_by(self, value: Any, entered: dict[int, AttentionHook]) -> None:
        """Nobody waits here; but for what comes behind it somebody may."""
        if self.at_module is not None:
            self.at_module.pass_by(value)
        if self.enters is not None:
            entered[id(self.enters)] = self.enters
        elif self.leaves is not None:
            entered.pop(id(self.leaves), None)


# The locations that are counted when a module's side is passed, and what there is to do besides.
Side = tuple[tuple[str, ...], LocationState | None]


def _side(locations: tuple[str, ...], location_state: LocationState | None) -> Side:
    if location_state is None:
        return locations, None
    return (*locations, *location_state.counted), location_state if location_state.more else None


class FastPathInterleaver(Interleaver):
    """Notes by module what is passed where nobody waits, and counts it once somebody asks.

    nnsight hands over a module's input, its gate and its output one by one, and counts each: that is most of
    what a trace costs beside the model. `occupied` are the locations where more is to do than that.
    """

    def __init__(self) -> None:
        self.occupied: set[str] = set()
        self.location_states: dict[str, LocationState] = {}
        self.entered: dict[int, AttentionHook] = {}
        self.sides: dict[str, tuple[Side, Side, Side]] = {}
        self.passed: list[tuple[str, ...]] = []
        self._counts: dict[str, int] = {}
        super().__init__()

    @property
    def counts(self) -> dict[str, int]:  # type: ignore[override]
        """How many times each location has been passed since the first block now at work was started."""
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
        # A block counts from where it starts: where none has, nothing need be counted up to there.
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
        """Those of a module, made when it is first called: before it, before it where a block waits for its
        output, and after it."""
        begin, gate, end = locations
        location_states = self.location_states.get(begin), self.location_states.get(end)
        before, after = _side((begin, gate), location_states[0]), _side((end,), location_states[1])
        quiet = before
        if is_leaf and location_states[0] is not None and location_states[0].feeds_only(location_states[1]):
            # While it runs nobody can come to wait for what is behind it: nothing of ours runs inside.
            quiet, after = (before[0], None), (after[0], None)
        self.sides[begin] = quiet, before, after
        return quiet, before, after


class FastPathController(Controller):
    """A module's forward in a trace: nnsight's, which asks whether anybody waits once, not three times."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        state, module = self.state, self.module_ref()
        engine, _, locations = state.active()
        if not isinstance(engine, FastPathInterleaver) or state.sourced:
            return super().__call__(*args, **kwargs)
        begin, gate, end = locations
        occupied = engine.occupied
        if begin in occupied or gate in occupied:
            return super().__call__(*args, **kwargs)
        sides = engine.sides.get(begin)
        if sides is None:
            assert module is not None
            sides = engine.sides_of(locations, is_leaf=next(module.children(), None) is None)
        passed, location_state = sides[1] if end in occupied else sides[0]
        engine.passed.append(passed)
        if location_state is not None:
            location_state.pass_by((args, kwargs), engine.entered)
        output = run_body(state, module, args, kwargs)
        if end in engine.occupied:
            return engine.handle(end, output)
        passed, location_state = sides[2]
        engine.passed.append(passed)
        if location_state is not None:
            location_state.pass_by(output, engine.entered)
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> FastPathController:
        made = super().__deepcopy__(memo)
        return FastPathController(made.module_ref(), made.state)

    def __reduce__(self) -> tuple[Any, ...]:
        return FastPathController, super().__reduce__()[1]
