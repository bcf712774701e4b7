"""Options of a generation: refused before anything runs where they mean nothing."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from mm_adapters._errors import InputError
from mm_adapters.inputs.numbers import check_finite, check_whole

_WHOLE = {
    "max_new_tokens": 1, "max_length": 1, "min_new_tokens": 0, "min_length": 0, "num_beams": 1,
    "num_return_sequences": 1, "top_k": 0, "no_repeat_ngram_size": 0,
}  # fmt: skip
_POSITIVE = ("temperature", "repetition_penalty")
_SHARES = ("top_p", "min_p", "typical_p")


def check_generation(model: Any, arguments: Mapping[str, Any]) -> None:
    """Passes if these are options of transformers' generation.

    Raises: InputError for numbers that mean nothing, and with transformers' reason for what it refuses.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    for name, value in given.items():
        if name in _WHOLE:
            check_whole(name, value, _WHOLE[name])
        elif name in (*_POSITIVE, *_SHARES):
            check_finite(name, value)
            if name in _POSITIVE and float(value) <= 0:
                raise InputError(
                    f"{name}={value}: pass a number above 0. To take the likeliest, do_sample=False."
                )
            if name in _SHARES and not 0 <= float(value) <= 1:
                raise InputError(f"{name}={value}: it is a probability, from 0 to 1.")
    config = given.get("generation_config") or getattr(model, "generation_config", None)
    settings = {name: value for name, value in given.items() if hasattr(config, name)}
    if not settings or not hasattr(config, "validate"):
        return
    changed: Any = copy.deepcopy(config)
    try:
        changed.update(**settings)
        changed.validate()
    except (ValueError, TypeError) as error:
        raise InputError(f"{type(model).__name__} cannot generate so: {error}") from None
