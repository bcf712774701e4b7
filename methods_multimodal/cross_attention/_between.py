"""What happens between the steps of a sampling loop: pipelines with a callback there allow it."""

from __future__ import annotations

import inspect
from typing import Any

from mm_adapters import InputError, Model

_CALLBACK = "callback_on_step_end"


def check_between_steps(model: Model, what: str) -> None:
    """Raises: InputError if the pipeline cannot be acted on between its steps."""
    if not _takes_callback(model):
        raise InputError(f"{what} acts between steps, and the pipeline of {model.name} takes no {_CALLBACK}.")


def first_step_alone(model: Model) -> dict[str, Any]:
    """Options for a run of which only the first step counts: the others are passed over, if they can be."""
    return {"output_type": "latent", **({_CALLBACK: _stop} if _takes_callback(model) else {})}


def _takes_callback(model: Model) -> bool:
    return _CALLBACK in inspect.signature(type(model.wrapped).__call__).parameters


def _stop(pipeline: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    pipeline._interrupt = True  # The library's own way to pass over the steps that are left.
    return {}
