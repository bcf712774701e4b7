"""A long sum or list that is written down as it grows, and gone on with after a kill."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from mm_adapters import CheckpointError, StoreError
from mm_adapters.store import SaveClock, load_tensors, save_tensors

R = TypeVar("R")
State = Mapping[str, Tensor]
_NEXT = "next"


def run_steps(n: int, step: Callable[[State, int], State], start: State, file: Path | None) -> State:
    """`step(state, i)` for i = 0 to n - 1, each on what the one before gave.

    With a `file`, in a folder of this run's own, the state is written there whenever that costs little of
    the time, when the block ends with an error, and at the end; and is where a run begins.

    Raises: StoreError if the file is damaged.
    """
    state, first = start, 0
    if file is not None and (found := newest(file, _read)) is not None:
        first, tensors = found
        state = {name: tensors[name].to(value.device) for name, value in start.items()}
    clock, saved = SaveClock(n=n), first
    at = first
    try:
        for at in range(first, n):
            state = step(state, at)
            if file is not None and at + 1 == n:
                _write(file, state, n, durable=True)
                recent(file).unlink(missing_ok=True)
                saved = n
            elif file is not None and clock.is_due():
                with clock.saving():
                    _write(recent(file), state, at + 1, durable=False)
                saved = at + 1
    except BaseException:
        if file is not None and saved < at:
            with suppress(StoreError):  # What was saved before stays.
                _write(file, state, at, durable=True)
        raise
    return state


def recent(file: Path) -> Path:
    """Where what changes often is kept: it outlives the process, and not for certain a power failure."""
    return file.with_name(f"{file.stem}.recent{file.suffix}")


def newest(file: Path, read: Callable[[Path], tuple[int, R]]) -> tuple[int, R] | None:
    """How far a file, or the recent one beside it, has come, and what it holds; None if there is neither.

    Raises: StoreError if those that are there are damaged.
    """
    found: list[tuple[int, R]] = []
    damaged: CheckpointError | None = None
    for path in (file, recent(file)):
        if path.is_file():
            try:
                found.append(read(path))
            except CheckpointError as error:
                damaged = error
    if damaged is not None and not found:
        raise StoreError(f"{damaged} Or delete {file.parent} to start afresh.") from None
    return max(found, key=lambda one: one[0]) if found else None


def _read(path: Path) -> tuple[int, State]:
    tensors, facts = load_tensors(path)
    if not facts.get(_NEXT, "").isdecimal():
        raise CheckpointError(f"{path} does not say how far it has come.")
    return int(facts[_NEXT]), tensors


def _write(path: Path, state: State, position: int, *, durable: bool) -> None:
    save_tensors(path, state, {_NEXT: str(position)}, durable=durable)
