"""When work is saved: how much of the time it takes, and how much a kill costs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from mm_adapters.storage import save_clock
from mm_adapters.store import SaveClock


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


def saves_of(
    monkeypatch: pytest.MonkeyPatch, n_steps: int, step_s: float, save_s: float, **options: Any
) -> list[int]:
    """After which steps a save is made, if each step and each save takes so many seconds."""
    time = Clock()
    monkeypatch.setattr(save_clock, "time", time)
    clock, saves = SaveClock(**options), []
    for step in range(n_steps):
        time.now += step_s
        if clock.is_due():
            with clock.saving():
                time.now += save_s
            saves.append(step)
    return saves


def between(saves: list[int]) -> set[int]:
    """How many steps lie between the saves, once what one takes is known."""
    return {b - a for a, b in pairwise(saves[3:])}


def test_saving_takes_a_twentieth_of_the_time_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    saves = saves_of(monkeypatch, 10_000, 1 / 64, 1 / 32)
    assert saves[:3] == [0, 1, 2]  # What a save takes is not known before there were some.
    assert between(saves) == {40}
    assert between(saves_of(monkeypatch, 10_000, 1 / 64, 8.0)) == {64 * 30}  # At least each half minute.


def test_a_short_work_of_known_length_loses_a_twentieth(monkeypatch: pytest.MonkeyPatch) -> None:
    short = 1 / 1024
    assert between(saves_of(monkeypatch, 100, short, 1 / 32, n=100)) == {5}
    assert len(saves_of(monkeypatch, 100, short, 1 / 32)) == 3
    assert saves_of(monkeypatch, 7, short, 1 / 32, n=7) == list(range(7))
    # A save that takes long is not made more often for that.
    assert saves_of(monkeypatch, 100, short, 0.25, n=100) == saves_of(monkeypatch, 100, short, 0.25)
