"""Tensors that a user prepared: can they be what the model reads? Found out before any module runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mm_adapters._errors import InputError
from mm_adapters.inputs.cache_argument import NEW, OLD, cache_name, cache_of
from mm_adapters.inputs.image_counts import check_images, check_videos
from mm_adapters.records.image_tokens import ImageTokens, VideoTokens

_PIXELS = ("pixel_values", "image")
_MASK = "pixel_attention_mask"
# Each with the tokens that it has an entry for.
_BESIDE = {
    "attention_mask": "input_ids", "token_type_ids": "input_ids", "mm_token_type_ids": "input_ids",
    "decoder_attention_mask": "decoder_input_ids", "qformer_attention_mask": "qformer_input_ids",
}  # fmt: skip
# What a model takes in place of an image's pixels.
_FEATURES = (
    "mm_encoder_outputs",
    NEW,
    OLD,
    "encoder_outputs",
    "decoder_input_ids",
    "pixel_values_videos",
)


@dataclass(frozen=True)
class Readable:
    """What a model reads.

    Args:
        text_key: Its argument of tokens; "" if it takes none.
        image_key: Its argument of pixels.
        context: The longest sequence, in tokens.
        n_tokens: Tells the size of its vocabulary.
        placeholders: Ids that may lie outside it.
        image_size: (height, width) in pixels; None for any.
        n_channels: Of a picture.
        image_id: The token that stands for a picture among the words.
        feeds: The arguments of which a call has one at least.
        images: How a picture's tokens lie among the words, which tells how many they are.
        n_class: The vision tower's class tokens.
        videos: As `images`, of a video.
        video_id: The token that stands for a video.
        config: The model's, which `images` and `videos` refer to.
    """

    text_key: str = ""
    image_key: str = ""
    context: int | None = None
    n_tokens: Callable[[], int | None] | None = None
    placeholders: frozenset[int] = frozenset()
    image_size: tuple[int, int] | None = None
    n_channels: int | None = None
    image_id: int | None = None
    feeds: tuple[str, ...] = ()
    images: ImageTokens | None = None
    n_class: int = 0
    videos: VideoTokens | None = None
    video_id: int | None = None
    config: Any = field(default=None, repr=False)

    def check(self, arguments: Mapping[str, Any]) -> None:
        """Passes if these arguments can be what the model reads.

        Raises: InputError for what is no tensor, a batch of none, NaN or infinite pixels, the wrong number
        of pixels or channels, tokens that the vocabulary does not have or more than the model reads, a mask
        of another shape than the tokens, or pictures that no token stands for.
        """
        self._check_fed(arguments)
        pictures = {*_PIXELS, self.image_key}
        for key, value in arguments.items():
            if key in {*pictures, self.text_key} and value is not None and not isinstance(value, Tensor):
                self._check_kind(key, value, "images" if key in pictures else "text")
            if not isinstance(value, Tensor):
                continue
            if value.ndim and 0 in value.shape:
                raise InputError(f"{key} is empty: its shape is {list(value.shape)}.")
            if key in pictures:
                self._check_pixels(key, value, resized=bool(arguments.get("interpolate_pos_encoding")))
            if key == self.text_key:
                self._check_tokens(key, value)
        past = cache_of(arguments)
        if past is None:
            _check_beside(arguments)
        elif not isinstance(past, tuple) and not hasattr(past, "get_seq_length"):
            name = cache_name(arguments.__contains__)
            raise InputError(f"{name} is {type(past).__name__}. Pass a cache of transformers.")
        _check_mask(arguments, arguments.get(self.image_key))
        if past is None:
            self._check_videos(arguments)
        self._check_placeholders(arguments)

    def _check_videos(self, arguments: Mapping[str, Any]) -> None:
        ids, pixels = arguments.get(self.text_key), arguments.get("pixel_values_videos")
        if self.video_id is not None and pixels is not None and isinstance(ids, Tensor) and _has_values(ids):
            check_videos(self.videos, self.config, arguments, int((ids == self.video_id).sum()))

    def _check_kind(self, key: str, value: Any, raw: str) -> None:
        if isinstance(value, list | tuple) and value and all(isinstance(one, Tensor) for one in value):
            return
        raise InputError(
            f"{key} is {type(value).__name__}, and the model's own argument is a tensor. Pass {raw}= for raw "
            f"{'pictures' if raw == 'images' else 'text'}."
        )

    def _check_fed(self, arguments: Mapping[str, Any]) -> None:
        fed = (k for k, v in arguments.items() if v is not None)
        if self.feeds and not any(k in self.feeds or "embeds" in k or k in _FEATURES for k in fed):
            raise InputError(
                f"There is nothing to run on. Pass text= or images=, or {' or '.join(self.feeds)}."
            )

    def _check_tokens(self, key: str, value: Tensor) -> None:
        if self.context and value.shape[-1] > self.context:
            raise InputError(
                f"{key} has {value.shape[-1]} tokens a row and this model reads at most "
                f"{self.context}. Shorten the text."
            )
        if value.ndim != 2:
            raise InputError(
                f"{key} is {list(value.shape)} and this model reads [row, token]. Add the batch axis."
            )
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise InputError(
                f"{key} is {str(value.dtype).removeprefix('torch.')}. Pass tokens as whole numbers."
            )
        n_tokens = None if self.n_tokens is None else self.n_tokens()
        if not n_tokens or not _has_values(value):
            return
        lowest, highest = map(int, value.aminmax())
        if not 0 <= lowest <= highest < n_tokens:
            outside = (value < 0) | (value >= n_tokens)
            wrong = sorted({*value[outside].tolist()} - self.placeholders)
            if wrong:
                raise InputError(
                    f"{key} has the token {wrong[0]}, and this model's vocabulary is 0 to {n_tokens - 1}. "
                    "Pass tokens of its own tokenizer."
                )

    def _check_pixels(self, key: str, value: Tensor, *, resized: bool) -> None:
        shape = list(value.shape)
        if not value.is_floating_point():
            raise InputError(
                f"{key} is {str(value.dtype).removeprefix('torch.')}, and this model reads normalised "
                "pixels as "
                "floats. Pass images=, which are converted."
            )
        if _has_values(value) and not bool(torch.isfinite(value).all()):
            raise InputError(f"{key} has values that are NaN or infinite. Replace them.")
        height, width = self.image_size or ("height", "width")
        want = f"[batch, {self.n_channels or 'channel'}, {height}, {width}]"
        if value.ndim < 4:
            if self.image_size is None:  # Patches cut beforehand.
                return
            raise InputError(f"{key} is {shape} and this model reads {want}. Add the batch axis.")
        if self.n_channels and shape[-3] != self.n_channels:
            raise InputError(
                f"{key} is {shape}, with {shape[-3]} channels, and this model reads {want}. Pass "
                "images=, which are converted."
            )
        if self.image_size is not None and not resized and (shape[-2], shape[-1]) != self.image_size:
            raise InputError(
                f"{key} is {shape[-2]} x {shape[-1]} pixels and this model reads {height} x "
                f"{width}. Resize it, or pass images=, which are resized."
            )

    def _check_placeholders(self, arguments: Mapping[str, Any]) -> None:
        ids, pixels = arguments.get(self.text_key), arguments.get(self.image_key)
        if self.image_id is None or not isinstance(ids, Tensor) or not isinstance(pixels, Tensor):
            return
        if any(v is not None and (k in _FEATURES or "embeds" in k) for k, v in arguments.items()):
            return
        if not _has_values(ids):
            return
        n_tokens = int((ids == self.image_id).sum())
        if n_tokens:
            check_images(self.images, self.config, arguments, n_tokens, pixels, self.n_class)
        else:
            raise InputError(
                f"{self.image_key} has pictures, and no token of {self.text_key} stands for one (id "
                f"{self.image_id}). Pass text= with images=, or the tokens that the processor makes for both."
            )


def _check_mask(arguments: Mapping[str, Any], pixels: Any) -> None:
    mask = arguments.get(_MASK)
    if not isinstance(mask, Tensor) or not isinstance(pixels, Tensor) or pixels.ndim < 4 or mask.ndim < 2:
        return
    if mask.shape[-2:] != pixels.shape[-2:]:
        raise InputError(
            f"{_MASK} is {list(mask.shape)} for pictures of {list(pixels.shape)}. Pass one entry for each "
            "pixel."
        )


def _check_beside(arguments: Mapping[str, Any]) -> None:
    for key, tokens in _BESIDE.items():
        value, ids = arguments.get(key), arguments.get(tokens)
        if not isinstance(value, Tensor) or not isinstance(ids, Tensor) or ids.ndim != 2:
            continue
        # A mask of more axes says which position attends to which.
        if value.ndim <= 2 and value.shape != ids.shape:
            raise InputError(
                f"{key} is {list(value.shape)} and {tokens} is {list(ids.shape)}. Pass one entry for "
                "each token."
            )
    places, ids = arguments.get("position_ids"), arguments.get("input_ids")
    if isinstance(places, Tensor) and isinstance(ids, Tensor) and places.shape[-1] != ids.shape[-1]:
        raise InputError(
            f"position_ids is {list(places.shape)} and input_ids is {list(ids.shape)}. Pass one for each "
            "token."
        )


def _has_values(value: Tensor) -> bool:
    return not value.is_meta and not isinstance(value, FakeTensor) and value.numel() > 0
