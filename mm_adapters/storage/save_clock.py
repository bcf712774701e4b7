"""When to save: often enough that a kill loses little, seldom enough that saving costs little."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

_SHARE = 0.03
_MOST_S = 30.0


class SaveClock:
    """Says that a save is due once the last one has become a small share of the time since.

    What is lost to a kill is then some thirty times what a save takes, and at most half a minute.
    """

    def __init__(self, share: float = _SHARE, most_s: float = _MOST_S) -> None:
        self._share, self._most_s = share, most_s
        self._cost_s = 0.0
        self._last = time.monotonic()

    def is_due(self) -> bool:
        """Whether to save now."""
        passed = time.monotonic() - self._last
        return passed >= self._most_s or self._cost_s <= self._share * passed

    @contextmanager
    def saving(self) -> Iterator[None]:
        """A save happens inside; its time is taken."""
        began = time.monotonic()
        yield
        self._last = time.monotonic()
        self._cost_s = self._last - began
