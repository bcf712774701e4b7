"""Paired rounds: every contestant once a round, in turn, by processor time."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

Work = Callable[[], object]


def paired(
    works: dict[str, Work], rounds: int, repeat: int = 1, clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """Seconds of processor time (or of another clock) per call, one entry a round.

    The order turns by one each round, so that no contestant always follows the same one.
    """
    names = list(works)
    for name in names:
        works[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            for i in range(len(names)):
                name = names[(i + turn) % len(names)]
                start = clock()
                for _ in range(repeat):
                    works[name]()
                seconds[name].append((clock() - start) / repeat)
    finally:
        gc.enable()
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, base: str) -> float:
    """The median over rounds of one contestant's time over another's."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


def extra(seconds: dict[str, list[float]], name: str, base: str) -> float:
    """The median over rounds of what one contestant takes on top of another, in seconds."""
    return statistics.median(a - b for a, b in zip(seconds[name], seconds[base], strict=True))
