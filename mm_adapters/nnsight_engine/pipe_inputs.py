"""What the invokes of a run give a pipeline of transformers, as one call of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mm_adapters._errors import InputError
from mm_adapters.nnsight_engine.call_arguments import is_text

Pipe = tuple[tuple[Any, ...], dict[str, Any]]


def joined(pipes: list[Pipe]) -> Pipe:
    """The inputs of a run's invokes as one call of a pipeline, which makes one batch of several texts.

    Raises: InputError if there are several and one is no text, whose rows are unknown; if options differ.
    """
    first = pipes[0]
    if len(pipes) == 1 and (not n_texts(first) or isinstance(first[0][0], str)):
        return first
    if not all(n_texts(pipe) for pipe in pipes):
        raise InputError(
            "Several invokes of a pipe take one text or a list of texts each. Give other inputs to pipes of "
            "their own, or all of them in one."
        )
    texts = [text for pipe in pipes for text in _texts(pipe)]
    names = dict.fromkeys(name for _, kwargs in pipes for name in kwargs)
    options = {name: common(name, [kwargs.get(name) for _, kwargs in pipes]) for name in names}
    return (texts,), {"batch_size": len(texts), **options}


def n_texts(pipe: Pipe) -> int:
    """How many texts a pipeline's input is; 0 for what is none."""
    return len(_texts(pipe))


def _texts(pipe: Pipe) -> list[str]:
    inputs, _ = pipe
    if len(inputs) != 1 or not is_text(inputs[0]):
        return []
    return [inputs[0]] if isinstance(inputs[0], str) else list(inputs[0])


def common(key: str, values: list[Any]) -> Any:
    """The value that all invokes of a run give an option. Raises: InputError if they differ."""
    first = values[0]
    for other in values[1:]:
        same = torch.equal(first, other) if isinstance(first, Tensor) else first == other
        if not same:
            raise InputError(
                f"{key} is {first!r} in one invoke and {other!r} in another, and one run has one "
                "value for all. Give it to the trace, or run them one by one."
            )
    return first
