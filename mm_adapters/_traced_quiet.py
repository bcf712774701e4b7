"""What a module costs in a trace where nobody waits at it: little more than its own forward."""

from __future__ import annotations

from typing import Any

from nnsight.intervention.interleaver import Interleaver
from nnsight.intervention.source import Controller, run_body

from mm_adapters._taps import AttentionTap
from mm_adapters._traced_points import Station


class Place:
    """What there is to do at a location besides what nnsight does.

    Where nobody waits, the sites at `counted` are counted; `more` says whether that is not all.
    """

    __slots__ = ("counted", "enters", "leaves", "more", "station")

    def __init__(self) -> None:
        self.station: Station | None = None
        self.enters: AttentionTap | None = None
        self.leaves: AttentionTap | None = None
        self.counted: list[str] = []
        self.more = False

    def add(self, points: Any, more: bool) -> None:
        """Counts these points too where nobody waits; `more`: and that is not all there is to do."""
        self.counted += [point.location for point in points]
        self.more = self.more or more

    def feeds_only(self, other: Place | None) -> bool:
        """Whether all that is done here is to keep something for readers at the other location, and all that
        is done there where nobody waits is to let go of just that."""
        here, there = self.station, None if other is None else other.station
        if here is None or there is None or other is None or here.forgets or there.keeps:
            return False
        if any(tap is not None for tap in (self.enters, self.leaves, other.enters, other.leaves)):
            return False
        kept = [keep.reader for keep, _ in here.keeps]
        let_go = [reader for reader, _ in there.forgets]
        return all(reader in there.readers for reader in kept) and all(reader in kept for reader in let_go)

    def pass_by(self, value: Any, entered: dict[int, AttentionTap]) -> None:
        """Nobody waits here; but for what comes behind it somebody may."""
        if self.station is not None:
            self.station.pass_by(value)
        if self.enters is not None:
            entered[id(self.enters)] = self.enters
        elif self.leaves is not None:
            entered.pop(id(self.leaves), None)


# The locations that are counted when a module's side is passed, and what there is to do besides.
Side = tuple[tuple[str, ...], Place | None]


def _side(locations: tuple[str, ...], place: Place | None) -> Side:
    if place is None:
        return locations, None
    return (*locations, *place.counted), place if place.more else None


class QuietInterleaver(Interleaver):
    """Notes by module what is passed where nobody waits, and counts it once somebody asks.

    nnsight hands over a module's input, its gate and its output one by one, and counts each: that is most of
    what a trace costs beside the model. `occupied` are the locations where more is to do than that.
    """

    def __init__(self) -> None:
        self.occupied: set[str] = set()
        self.places: dict[str, Place] = {}
        self.entered: dict[int, AttentionTap] = {}
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

    def __enter__(self) -> QuietInterleaver:
        # A block counts from where it starts: where none has, nothing need be counted up to there.
        if all(mediator.worker is None for mediator in self.mediators):
            self.counts = {}
        super().__enter__()
        return self

    def instrument(self, envoy: Any) -> None:
        super().instrument(envoy)
        forward = envoy._module.__dict__.get("forward")
        if type(forward) is Controller:
            envoy._module.__dict__["forward"] = QuietController(envoy._module, forward.state)

    def sides_of(self, locations: tuple[str, str, str], is_leaf: bool) -> tuple[Side, Side, Side]:
        """Those of a module, made when it is first called: before it, before it where a block waits for its
        output, and after it."""
        begin, gate, end = locations
        places = self.places.get(begin), self.places.get(end)
        before, after = _side((begin, gate), places[0]), _side((end,), places[1])
        quiet = before
        if is_leaf and places[0] is not None and places[0].feeds_only(places[1]):
            # While it runs nobody can come to wait for what is behind it: nothing of ours runs inside.
            quiet, after = (before[0], None), (after[0], None)
        self.sides[begin] = quiet, before, after
        return quiet, before, after


class QuietController(Controller):
    """A module's forward in a trace: nnsight's, which asks whether anybody waits once, not three times."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        state, module = self.state, self.module_ref()
        engine, _, locations = state.active()
        if not isinstance(engine, QuietInterleaver) or state.sourced:
            return super().__call__(*args, **kwargs)
        begin, gate, end = locations
        occupied = engine.occupied
        if begin in occupied or gate in occupied:
            return super().__call__(*args, **kwargs)
        sides = engine.sides.get(begin)
        if sides is None:
            assert module is not None
            sides = engine.sides_of(locations, is_leaf=next(module.children(), None) is None)
        passed, place = sides[1] if end in occupied else sides[0]
        engine.passed.append(passed)
        if place is not None:
            place.pass_by((args, kwargs), engine.entered)
        output = run_body(state, module, args, kwargs)
        if end in engine.occupied:
            return engine.handle(end, output)
        passed, place = sides[2]
        engine.passed.append(passed)
        if place is not None:
            place.pass_by(output, engine.entered)
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> QuietController:
        made = super().__deepcopy__(memo)
        return QuietController(made.module_ref(), made.state)

    def __reduce__(self) -> tuple[Any, ...]:
        return QuietController, super().__reduce__()[1]
