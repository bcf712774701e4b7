"""Which call of a tower it is within a run, and how many positions came before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mm_adapters.inputs.cache_argument import cache_of
from mm_adapters.runs.lens import Call
from mm_adapters.runs.schedule import Schedule


class Clock:
    """Counts one tower's calls. One whose parts alone are called (a VQ model's encoder) stays at the first.

    Args:
        schedule: Of a denoiser, its loop's steps. Without one, each call is a step.
        parts: What its calls within one evaluation are for, where guidance makes several.
    """

    def __init__(self, schedule: Schedule | None = None, parts: tuple[str, ...] = ()) -> None:
        self._schedule = schedule
        self._parts = parts
        self._n_calls = 0
        self._turn = -1
        self._n_added = 0
        # Which call of its evaluation this is: more than the parts of guidance, if a guider calls once more.
        self.part = 0
        self.call = Call(0, 0)
        self.n_steps = 0
        self.n_before = 0
        self.n_rows = 0

    def tick(self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A forward pre-hook of the tower."""
        turn = self._n_calls if self._schedule is None else self._schedule.turn()
        self._n_calls += 1
        given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim), None)
        self.n_rows = 0 if given is None else len(given)
        self.moved_to(turn, self.part + 1 if turn == self._turn else 0, n_past(kwargs))

    def moved_to(self, turn: int, part: int, n_before: int) -> None:
        """Sets it to a part of an evaluation, behind so many positions."""
        step, order = Call(turn, 0) if self._schedule is None else self._schedule.call_of(turn)
        self._turn, self.part, self.n_before = turn, part, n_before
        if step != self.call.step:
            self._n_added = 0
        if not self.is_guidance:
            self._n_added += 1
        self.call = Call(step, order + self._n_added)
        self.n_steps = max(self.n_steps, step + 1)

    @property
    def is_guidance(self) -> bool:
        """Whether this call is one of guidance's own, and not one that a guider adds."""
        return self.part < max(1, len(self._parts))

    @property
    def turn(self) -> int:
        """The number of the evaluation; outside sampling loops, of the call."""
        return max(self._turn, 0)


def n_past(kwargs: Mapping[str, Any]) -> int:
    """How many positions a key-value cache holds."""
    past = cache_of(kwargs)
    return 0 if past is None or not hasattr(past, "get_seq_length") else int(past.get_seq_length())
