"""Which step of a sampling loop a call of its denoiser belongs to, by what the loop's scheduler does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from mm_adapters.records.spec import ModelRecord
from mm_adapters.runs.lens import Call


class Schedule:
    """The steps of one loop in one run.

    A loop evaluates its denoiser (in one call, or one for each part of guidance) and lets its scheduler move
    the latents, by turns. A scheduler of second order takes two such turns a step, and says so.
    """

    def __init__(self, pipeline: Any, scheduler: str) -> None:
        self._scheduler = getattr(pipeline, scheduler, None)
        self._turns = 0
        self._first: int | None = None

    @classmethod
    def of(cls, pipeline: Any, record: ModelRecord, loop: str) -> Schedule | None:
        """That of a pipeline's loop; None where no scheduler says."""
        sampling = record.sampling_of(loop)
        schedule = None if sampling is None else cls(pipeline, sampling.scheduler)
        return schedule if schedule is not None and schedule.is_known else None

    @property
    def is_known(self) -> bool:
        """Whether there is a scheduler to go by."""
        return hasattr(self._scheduler, "step")

    @contextmanager
    def watched(self) -> Iterator[None]:
        """The scheduler's turns are counted inside."""
        scheduler: Any = self._scheduler
        before = vars(scheduler).get("step")
        step = scheduler.step

        @wraps(step)
        def counted(*args: Any, **kwargs: Any) -> Any:
            moved = step(*args, **kwargs)
            self._turns += 1
            return moved

        scheduler.step = counted
        try:
            yield
        finally:
            if before is None:
                del scheduler.step
            else:
                scheduler.step = before

    def turn(self) -> int:
        """The number of the turn that is being taken, counted from the denoiser's first call."""
        if self._first is None:
            self._first = self._turns
        return self._turns - self._first

    def call_of(self, turn: int) -> Call:
        """The step that a turn belongs to, and its number among the turns of that step."""
        scheduler = self._scheduler
        warm_up = n_runge_kutta(scheduler)
        if warm_up is None:
            return Call(*divmod(turn, max(1, int(getattr(scheduler, "order", 1)))))
        if turn < warm_up:
            return Call(*divmod(turn, 4))
        if warm_up:
            return Call(warm_up // 4 + turn - warm_up, 0)
        # A linear multistep method that begins by itself takes its first step twice.
        return Call(0, turn) if turn < 2 else Call(turn - 1, 0)


def n_runge_kutta(scheduler: Any) -> int | None:
    """Of a pseudo linear multistep scheduler, its turns of a Runge-Kutta method, four a step; else None.

    Source: diffusers 0.39, schedulers/scheduling_pndm.py.
    """
    if not hasattr(scheduler, "step_prk"):
        return None
    if scheduler.config.skip_prk_steps:
        return 0
    turns = scheduler.prk_timesteps
    return 12 if turns is None else len(turns)
