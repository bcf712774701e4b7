"""A long sum or list that is written down as it grows, and gone on with after a kill."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from mm_adapters import CheckpointError, StoreError
from mm_adapters.store import SaveClock, load_tensors, save_tensors

State = Mapping[str, Tensor]
_NEXT = "next"


def run_steps(n: int, step: Callable[[State, int], State], start: State, file: Path | None) -> State:
    """`step(state, i)` for i = 0 to n - 1, each on what the one before gave.

    With a `file`, in a folder of this run's own, the state is written there whenever that costs little of
    the time, when the block ends with an error, and at the end; and is where a run begins.

    Raises: StoreError if the file is damaged.
    """
    state, first = start, 0
    if file is not None and file.is_file():
        try:
            tensors, facts = load_tensors(file)
            first = int(facts[_NEXT])
        except (CheckpointError, KeyError, ValueError) as error:
            raise StoreError(f"{file} is damaged: {error} Delete {file.parent} to start afresh.") from None
        state = {name: tensors[name].to(value.device) for name, value in start.items()}
    clock, saved = SaveClock(), first
    at = first
    try:
        for at in range(first, n):
            state = step(state, at)
            if file is not None and (at + 1 == n or clock.is_due()):
                with clock.saving():
                    save_tensors(file, state, {_NEXT: str(at + 1)})
                saved = at + 1
    except BaseException:
        if file is not None and saved < at:
            with suppress(StoreError):  # What was saved before stays.
                save_tensors(file, state, {_NEXT: str(at)})
        raise
    return state
