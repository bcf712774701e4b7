"""Interventions around an intervention: on a map's positions, and in some steps and rows of a loop."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pyvene as pv
import torch
from torch import Tensor, nn

from integrations.pyvene.options import check_options
from mm_adapters import EditNeverFiredError, InputError, Schedule
from mm_adapters.records import Guidance

Rows = str | slice | Sequence[int]
# pyvene asks for these by their class, which a wrapper hides.
_UNWRAPPABLE = (pv.CollectIntervention, pv.SkipIntervention)


class Wrapper(nn.Module):
    """An intervention around another one, `inner`.

    Raises: InputError for an `inner` that pyvene must see itself, or an option there is none of.
    """

    def __init__(self, inner: Any, **options: Any) -> None:
        parameters = inspect.signature(type(self)).parameters
        check_options(type(self), options, [name for name in parameters if name not in ("inner", "options")])
        if isinstance(inner, _UNWRAPPABLE):
            raise InputError(f"A {type(inner).__name__} does not work inside a {type(self).__name__}.")
        super().__init__()
        self.inner = inner
        self.trainable = getattr(inner, "trainable", False)
        self.is_source_constant = inner.is_source_constant
        self.keep_last_dim, self.use_fast = True, False
        self.interchange_dim = None


class MapIntervention(Wrapper):
    """Gives an intervention a UNet's map, [batch, channel, height, width], as [batch, position, channel]."""

    def forward(self, base: Tensor, source: Any = None, subspaces: Any = None, **kwargs: Any) -> Tensor:
        """The map with its positions intervened on."""
        new = self.inner(_positions(base), _positions(source), subspaces, **_mapped(kwargs))
        return new.transpose(1, 2).reshape(base.shape)


class StepGate(Wrapper):
    """Lets an intervention act in some steps of a sampling loop, on some of the rows.

    In an `MMIntervenableModel` the steps are the pipeline's, each with all its calls, and a run in which a
    step or the rows never came raises EditNeverFiredError. A gate that is called by itself counts its
    calls; `reset` starts again.

    Args:
        inner: The intervention.
        steps: The loop's steps, counted from 0.
        rows: "all"; a slice or numbers of rows of the batch; or a part of classifier-free guidance by its
            name, "cond" or "uncond", which needs an `MMIntervenableModel`.

    Raises: InputError for steps or rows that cannot be.
    """

    def __init__(self, inner: Any, steps: Iterable[int], rows: Rows = "all", **options: Any) -> None:
        super().__init__(inner, **options)
        self.steps = frozenset(steps)
        if not self.steps or any(not isinstance(step, int) or step < 0 for step in self.steps):
            raise InputError(f"steps={sorted(self.steps)}: give at least one step, counted from 0.")
        if not isinstance(rows, slice | str):
            rows = list(rows)
            if not rows or any(not isinstance(row, int) or isinstance(row, bool) for row in rows):
                raise InputError(f"rows={rows}: give a slice, numbers of rows, or a name.")
        self.rows: Rows = rows
        self._guidance: Guidance | None = None
        self._is_guided: Callable[[], bool] = lambda: False
        self.loop = ""
        self.reset()

    def reset(self, schedule: Schedule | None = None) -> None:
        """Counts from the first step again, by what a loop's scheduler does if its schedule is given."""
        self.n_steps = 0
        self._schedule = schedule
        self._n_calls, self._turn, self._part = 0, -1, 0
        self._acted: set[int] = set()

    def _next(self) -> tuple[int, int]:
        """The step that this call belongs to, and which of guidance's calls it is."""
        if self._schedule is None:
            step, self._part = divmod(self._n_calls, self._calls_a_step())
        else:
            turn = self._schedule.turn()
            self._part = self._part + 1 if turn == self._turn else 0
            self._turn = turn
            step = self._schedule.call_of(turn).step
        self._n_calls += 1
        self.n_steps = max(self.n_steps, step + 1)
        return step, self._part

    def attach(self, site: str, guidance: Guidance | None, is_guided: Callable[[], bool]) -> None:
        """Says how the loop at this site is guided.

        Raises: InputError if `rows` is a name that its guidance does not have.
        """
        self._guidance, self._is_guided = guidance, is_guided
        self.loop = site.partition(".")[0]
        if not isinstance(self.rows, str) or self.rows == "all":
            return
        known = () if guidance is None else guidance.denoiser_calls or guidance.denoiser_rows
        if self.rows not in known:
            raise InputError(
                f"rows={self.rows!r} at {site}: there is {', '.join((*known, 'all'))}, a slice, or numbers."
            )

    def check_acted(self) -> None:
        """Raises: EditNeverFiredError if a run had not all of the steps, or not the rows in them."""
        missing = sorted(self.steps - self._acted)
        if missing:
            raise EditNeverFiredError(
                f"A StepGate never acted at steps {missing} with rows={self.rows!r}: the run had "
                f"{self.n_steps} steps, or no such rows in them."
            )

    def forward(self, base: Tensor, source: Any = None, subspaces: Any = None, **kwargs: Any) -> Tensor:
        """The base, with its rows intervened on if this is one of the steps."""
        step, part = self._next()
        rows = self._rows_of(part, len(base)) if step in self.steps else []
        if len(rows) == 0:
            return base
        self._acted.add(step)
        new = self.inner(base, source, subspaces, **kwargs)
        if len(rows) == len(base):
            return new
        return base.index_copy(0, torch.tensor(rows, device=base.device), new[rows].to(base.dtype))

    def _calls_a_step(self) -> int:
        calls = () if self._guidance is None else self._guidance.denoiser_calls
        return len(calls) if calls and self._is_guided() else 1

    def _rows_of(self, part: int, n: int) -> list[int]:
        """Which of a call's `n` rows are the gate's; `part` is which of its step's calls it is."""
        every = list(range(n))
        if isinstance(self.rows, slice):
            return every[self.rows]
        if not isinstance(self.rows, str):
            if not all(-n <= row < n for row in self.rows):
                raise InputError(f"rows={list(self.rows)}: the batch has {n} rows.")
            return sorted({row % n for row in self.rows})
        if self.rows == "all":
            return every
        if self._guidance is None:
            raise InputError(f"rows={self.rows!r} is known inside an MMIntervenableModel; give a slice here.")
        if not self._is_guided():
            return every if self.rows == "cond" else []
        if self._guidance.denoiser_calls:
            return every if self._guidance.denoiser_calls[part : part + 1] == (self.rows,) else []
        parts = self._guidance.denoiser_rows
        size = n // len(parts)
        return every[parts.index(self.rows) * size :][:size]


def layers_of(intervention: Any) -> Iterator[Any]:
    """An intervention, and what is inside it from the outermost wrapper on."""
    yield intervention
    while isinstance(intervention, Wrapper):
        intervention = intervention.inner
        yield intervention


def _positions(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.flatten(2).transpose(1, 2)


def _mapped(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The module's own input, which pyvene adds with `as_adaptor`, laid out as the base is."""
    return {k: _positions(v) if isinstance(v, Tensor) and v.ndim == 4 else v for k, v in kwargs.items()}
