"""The share of its steps that a pipeline takes from a picture: at least one."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from mm_adapters._errors import InputError
from mm_adapters.inputs.call_names import parameters_of


def check_strength(pipeline: Any, arguments: Mapping[str, Any]) -> None:
    """Raises: InputError if `strength` leaves no step of `num_inference_steps`."""
    takes = parameters_of(type(pipeline).__call__)
    if not {"strength", "num_inference_steps"} <= takes.keys() or arguments.get("timesteps") is not None:
        return
    options = {name: _given(name, takes, arguments) for name in ("strength", "num_inference_steps")}
    if None in options.values():
        return
    n_left = _steps_left(pipeline, options | {"denoising_start": arguments.get("denoising_start")})
    if n_left == 0:
        strength, n_steps = options.values()
        raise InputError(
            f"strength={strength} of {n_steps} steps leaves none to take. Pass a strength above "
            f"{1 / n_steps:.3g}, or more num_inference_steps."
        )


def _given(name: str, takes: Mapping[str, inspect.Parameter], arguments: Mapping[str, Any]) -> Any:
    value = arguments.get(name)
    return takes[name].default if value is None else value


def _steps_left(pipeline: Any, options: Mapping[str, Any]) -> int | None:
    """As the pipeline itself counts them, on a copy of its scheduler; None where it asks for more."""
    count = getattr(type(pipeline), "get_timesteps", None)
    if count is None:
        return None
    scheduler = copy.deepcopy(pipeline.scheduler)
    known = {**options, "device": "cpu"}
    try:
        scheduler.set_timesteps(options["num_inference_steps"])
        asked = {name: known[name] for name in parameters_of(count) if name in known}
        timesteps, _ = count(SimpleNamespace(scheduler=scheduler), **asked)
        return len(timesteps)
    except (TypeError, ValueError, AttributeError, KeyError):
        return None
