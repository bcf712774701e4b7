"""Text that a call makes tokens of in a way of its own: cut, or without those of its start and end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch._subclasses.fake_tensor import unset_fake_temporarily

from mm_adapters._errors import InputError
from mm_adapters.inputs.prepare import Inputs
from mm_adapters.inputs.texts import as_texts

# A tokenizer's options that change which tokens a text is. nnsight's invokes take them beside a text.
OPTIONS = ("truncation", "max_length", "add_special_tokens")


def is_tokenized(arguments: Mapping[str, Any]) -> bool:
    """Whether a text in these arguments is made tokens of in a way of its own.

    `max_length` alone is no such way: it is a generation's length.
    """
    return any(arguments.get(name) is not None for name in OPTIONS if name != "max_length")


def tokenized(inputs: Inputs | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments in which a text that has such options is the tokens that they make of it.

    A text is cut only where `truncation` says so: to `max_length` tokens, or to what the model reads.

    Raises: InputError for such an option without a text, beside images, or without a tokenizer.
    """
    if not is_tokenized(arguments):
        return arguments
    options = {k: arguments[k] for k in OPTIONS if arguments.get(k) is not None}
    named = ", ".join(f"{name}=" for name in options)
    if not isinstance(arguments.get("text"), str | list | tuple):
        raise InputError(
            f"{named}: options of a tokenizer, and there is no text to make tokens of. Pass text=."
        )
    if arguments.get("images") is not None:
        raise InputError(
            f"{named}: the text has places of images in it, which would be cut. Leave {named} out."
        )
    tokenizer = getattr(inputs, "tokenizer", None)
    if inputs is None or not hasattr(tokenizer, "convert_ids_to_tokens") or inputs.pad_to_context:
        raise InputError(
            f"{named}: this model's texts are made tokens of in one way only. Leave {named} out."
        )
    if "max_length" in options and not options.get("truncation"):
        raise InputError(
            "max_length= is the length that truncation=True cuts a text to. Pass both, or neither."
        )
    texts = as_texts(arguments["text"])
    if options.get("truncation"):
        options.setdefault("max_length", inputs.context)
    rest = {k: v for k, v in arguments.items() if k not in (*OPTIONS, "text")}
    with unset_fake_temporarily():  # In a scan the tokens are real, so that they can be made.
        return rest | inputs.tokens(texts, **options)
