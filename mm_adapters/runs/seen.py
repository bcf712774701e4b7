"""What came up in a run of what was asked for: steps, calls, positions; and the error for the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from mm_adapters._errors import EditNeverFiredError, ReadNeverFiredError
from mm_adapters.runs.lens import Call, Edit, Read
from mm_adapters.sites.site_map import SiteMap

_CAUSES = (
    "The inputs may not use this part of the model; a cache, a compiled or a fused module may pass it over; "
    "or the rows named are not in this run."
)


class Seen:
    """The calls at which one read or edit fired, and the positions that it touched."""

    def __init__(self) -> None:
        self.steps: set[int] = set()
        self.orders: set[int] = set()
        self.positions: set[int] = set()

    def note(self, call: Call, positions: Iterable[int] = ()) -> None:
        """Notes one firing."""
        self.steps.add(call.step)
        self.orders.add(call.order)
        self.positions.update(positions)

    def state(self) -> list[list[int]]:
        """What it has noted so far; `restore` takes it back."""
        return [sorted(numbers) for numbers in (self.steps, self.orders, self.positions)]

    def restore(self, state: Sequence[Sequence[int]]) -> None:
        """Goes on from an earlier `state`."""
        self.steps, self.orders, self.positions = map(set, state)


def check_edits(
    edits: Sequence[Edit], seen: Sequence[Seen], sites: SiteMap, steps: Mapping[str, int]
) -> None:
    """Raises: EditNeverFiredError if one never fired, or not at all its steps, calls and positions."""
    idle = [e.site for e, s in zip(edits, seen, strict=True) if not s.steps]
    for edit, s in zip(edits, seen, strict=True):
        lacking = _lacking(edit, s, steps[sites[edit.site].tower])
        wanted = [] if edit.positions is None else [p for p in edit.positions if p >= 0]
        positions = [p for p in wanted if s.steps and p not in s.positions]
        if positions:
            lacking = f"this run came to no position {', '.join(map(str, positions))}"
        if lacking:
            raise EditNeverFiredError(f"The edit of {edit.site} was not made as asked: {lacking}.")
    if idle:
        raise EditNeverFiredError(f"The edit of {', '.join(idle)} never fired. {_CAUSES}")


def check_reads_fired(
    reads: Sequence[Read], seen: Sequence[Seen], sites: SiteMap, steps: Mapping[str, int]
) -> None:
    """Raises: ReadNeverFiredError if one never fired, or not at all the steps and calls it names."""
    for read, s in zip(reads, seen, strict=True):
        lacking = _lacking(read, s, steps[sites[read.site].tower])
        if lacking:
            raise ReadNeverFiredError(f"{read.site} was not read as asked: {lacking}.")
    idle = [r.site for r, s in zip(reads, seen, strict=True) if not s.steps]
    if idle:
        shown = ", ".join(idle[:5]) + (f" and {len(idle) - 5} others" if len(idle) > 5 else "")
        raise ReadNeverFiredError(f"{shown} never had a value in this run. {_CAUSES}")


def _lacking(asked: Read | Edit, seen: Seen, n_steps: int) -> str:
    if asked.steps is not None and n_steps:
        missing = [step for step in asked.steps if step not in seen.steps]
        beyond = [step for step in missing if step >= n_steps]
        if beyond:
            took = "one step" if n_steps == 1 else f"{n_steps} steps"
            return f"there is no step {_numbers(beyond)}, for this run took {took}, counted from 0"
        if missing and seen.steps:
            return f"at step {_numbers(missing)} it did not come up, with the rows and calls it names"
    if asked.calls is not None and seen.steps:
        missing = [order for order in asked.calls if order not in seen.orders]
        if missing:
            return f"no step had a call {_numbers(missing)}"
    return ""


def _numbers(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return f"{shown}, ..." if len(numbers) > 8 else shown
