"""A tokenizer set as nnsight sets one: what pads, and at which side; and settings that a user gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mm_adapters._errors import InputError
from mm_adapters.inputs.padding import is_encoder_decoder, pads_left
from mm_adapters.sites.site_map import SiteMap


def pad_as_nnsight(tokenizer: Any, model: Any, sites: SiteMap) -> None:
    """Pads as nnsight 0.8.1 does (modeling/transformers.py): where the tokenizer has no padding token its end
    token pads, and rows of a decoder are padded at the left, so that `[:, -1]` is each row's last token.

    Of decoders only those in which a row is then what it is alone (`inputs.padding`). The encoder of an
    encoder-decoder is padded at the right.
    """
    if not hasattr(tokenizer, "padding_side"):
        return
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    if pads_left(model, sites):
        tokenizer.padding_side = "left"
    elif is_encoder_decoder(model):
        tokenizer.padding_side = "right"


def set_up(tokenizer: Any, settings: Mapping[str, Any]) -> None:
    """Gives a tokenizer attributes, as nnsight's `tokenizer_kwargs=` does.

    Raises: InputError if there is no tokenizer, or it has no such attribute.
    """
    if not settings:
        return
    if tokenizer is None:
        raise InputError("tokenizer_kwargs= is for a tokenizer, and this model came without one.")
    unknown = [name for name in settings if not hasattr(tokenizer, name)]
    if unknown:
        raise InputError(
            f"tokenizer_kwargs has {', '.join(unknown)}, which {type(tokenizer).__name__} does not have. "
            "It takes a tokenizer's attributes: padding_side, truncation_side, pad_token, ..."
        )
    for name, value in settings.items():
        setattr(tokenizer, name, value)
