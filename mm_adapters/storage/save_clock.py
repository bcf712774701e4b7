"""When to save: often enough that a kill loses little, seldom enough that saving costs little."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

_SHARE = 0.05
_MOST_S = 30.0


class SaveClock:
    """Says that a save is due once what one takes has become a small share of the time since the last.

    What is lost to a kill is then some twenty times what a save takes, and at most half a minute.
    """

    def __init__(self, share: float = _SHARE, most_s: float = _MOST_S) -> None:
        self._share, self._most_s = share, most_s
        # The least of a few: a save that had to wait for other programs is no measure of the next.
        self._costs_s: deque[float] = deque([0.0], maxlen=3)
        self._last = time.monotonic()

    def is_due(self) -> bool:
        """Whether to save now."""
        passed = time.monotonic() - self._last
        return passed >= self._most_s or min(self._costs_s) <= self._share * passed

    @contextmanager
    def saving(self) -> Iterator[None]:
        """A save happens inside; its time is taken."""
        began = time.monotonic()
        yield
        self._last = time.monotonic()
        self._costs_s.append(self._last - began)
