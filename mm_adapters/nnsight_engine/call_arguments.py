"""The arguments of a traced call by name: the model's own, or raw text, images and messages."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from nnsight.modeling import processing
from torch import Tensor

from mm_adapters._errors import InputError
from mm_adapters.inputs.chat import is_chat, is_chats, spoken

REMOTE_OPTIONS = ("remote", "blocking", "job_id", "verbose")


def by_name(
    kind: str, takes: list[str], processor: Any, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """One call's arguments by name, raw text and images as they are.

    `takes` are the names of the wrapped model's arguments. The first positional argument may
    also be text, pictures, messages of a chat, or a dictionary of arguments.

    Raises: InputError if something is given twice.
    """
    first = inputs[0] if inputs else None
    raw: dict[str, Any] = {}
    if kind != "diffusion" and first is not None:
        if isinstance(first, Mapping):
            raw = dict(first)
        elif is_text(first):
            raw = {"text": first}
        elif is_chat(first) or is_chats(first):
            raw = spoken(processor, [first] if is_chat(first) else first)
        elif is_token_ids(first):
            raw = {"input_ids": first}
        elif _is_pictures(first):
            raw = {"images": first}
    if raw:
        inputs = inputs[1:]
    arguments = dict(kwargs) | dict(zip(takes, inputs, strict=False))
    for key in raw.keys() & arguments.keys():
        if key == "text":
            raise InputError("A prompt was given both positionally and as `text=`. Give it once.")
        raise InputError(f"{key} was given twice: in the first argument, and as {key}=. Give it once.")
    return raw | arguments


def is_text(value: Any) -> bool:
    """Whether this is a text or several."""
    return isinstance(value, str) or (
        isinstance(value, list | tuple) and bool(value) and all(isinstance(v, str) for v in value)
    )


def is_token_ids(value: Any) -> bool:
    """Whether these are token ids, of one row or several: whole numbers, in lists or lists of arrays."""
    if isinstance(value, Tensor) or getattr(value, "ndim", 1) > 2:  # An array of three axes is a picture.
        return False
    return processing.is_token_ids(value)


def _is_pictures(value: Any) -> bool:
    from PIL.Image import Image

    one = Image | os.PathLike
    return isinstance(value, one) or (
        isinstance(value, list | tuple) and bool(value) and all(isinstance(v, one) for v in value)
    )
