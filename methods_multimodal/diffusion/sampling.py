"""Which loop is meant, and what the record says of it."""

from __future__ import annotations

from mm_adapters import InputError, Model
from mm_adapters.records import Sampling


def sampling_of(model: Model, tower: str | None = None) -> tuple[str, Sampling]:
    """The tower that a sampling loop calls, the record's own by default, and what that loop denoises.

    Raises: InputError if the model has no such loop, or its record does not say what that denoises.
    """
    loops = model.loops()
    tower = tower or model.record.loop
    if tower is None or tower not in loops:
        loop_names = ", ".join(loops) or "none"
        raise InputError(f"{model.name} has no sampling loop of {tower!r}; its loops: {loop_names}.")
    sampling = model.record.sampling_of(tower)
    if sampling is None:
        raise InputError(
            f"The record of {model.record.name!r} does not say what the loop of {tower!r} denoises: its "
            "`sampling` has none of it."
        )
    return tower, sampling
