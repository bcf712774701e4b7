"""How many steps a pipeline surely takes with given options, before it runs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from mm_adapters import Model


def fewest_steps(model: Model, options: Mapping[str, Any]) -> int | None:
    """The least number of steps of a run with these options; None if they do not name a number.

    From pictures a pipeline takes the share `strength` of its steps, and between `denoising_start` and
    `denoising_end` those that lie there. Pipelines round that share up or down: the run may take one more.
    """
    n_steps = options.get("num_inference_steps")
    if n_steps is None:
        return None
    takes = inspect.signature(type(model.wrapped).__call__).parameters

    def option(name: str, without: float) -> float:
        value = options.get(name, takes[name].default if name in takes else without)
        return without if value is None else float(value)

    start = option("denoising_start", 0.0)
    share = option("denoising_end", 1.0) - start
    if not start:
        share = min(share, option("strength", 1.0))
    return max(int(n_steps * share + 1e-6), 1)
