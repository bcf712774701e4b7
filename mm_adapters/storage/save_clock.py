"""When to save: often enough that a kill loses little, seldom enough that saving costs little."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

_SHARE = 0.05
_MOST_S = 30.0
# A save that takes so little is made at each of so many parts of work whose length is known.
_PARTS, _LITTLE_S = 20, 0.05


class SaveClock:
    """Says that a save is due once what one takes has become a small share of the time since the last.

    What is lost to a kill is then some twenty times what a save takes, and at most half a minute. Of `n`
    steps it is no more than a twentieth either, while a save takes less than a twentieth of a second.
    """

    def __init__(self, share: float = _SHARE, most_s: float = _MOST_S, n: int | None = None) -> None:
        self._share, self._most_s = share, most_s
        # The least of a few: a save that had to wait for other programs is no measure of the next.
        self._costs_s: deque[float] = deque([0.0], maxlen=3)
        self._last = time.monotonic()
        self._part = None if n is None else max(1, n // _PARTS)
        self._n_asked = 0

    def is_due(self) -> bool:
        """Whether to save now; asked after each step."""
        self._n_asked += 1
        passed, cost = time.monotonic() - self._last, min(self._costs_s)
        by_part = self._part is not None and self._n_asked >= self._part and cost <= _LITTLE_S
        return by_part or passed >= self._most_s or cost <= self._share * passed

    @contextmanager
    def saving(self) -> Iterator[None]:
        """A save happens inside; its time is taken."""
        began = time.monotonic()
        yield
        self._last, self._n_asked = time.monotonic(), 0
        self._costs_s.append(self._last - began)
