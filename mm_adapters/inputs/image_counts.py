"""Do the image tokens of a prompt and its pictures agree in number? As far as it can be told before a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mm_adapters._errors import InputError
from mm_adapters.records.image_tokens import GridFrames, ImageTokens, Merged, Square, VideoTokens
from mm_adapters.tokens.image_positions import merged_grids, square_of
from mm_adapters.tokens.video_positions import frames_of_videos

_HOW = "Pass the tokens that the model's processor makes for these pictures, or text= with images=."


def check_images(
    image_tokens: ImageTokens | None,
    config: Any,
    arguments: Mapping[str, Any],
    n_tokens: int,
    pixels: Tensor,
    n_class: int = 0,
) -> None:
    """Passes if so many image tokens can stand for these pictures; `n_class` is the vision tower's.

    Raises: InputError with both numbers.
    """
    if isinstance(image_tokens, Square) and pixels.ndim >= 4:
        n_images = math.prod(pixels.shape[:-3])
        height, width = pixels.shape[-2:]
        each = _selected(config, height, width, n_class)
        if each is not None:
            _equal("image", n_tokens, n_images * each)
        if n_tokens % n_images or square_of(n_tokens // n_images, height, width) is None:
            raise InputError(
                f"There are {n_tokens} image tokens for {n_images} pictures of {height} x {width} "
                "pixels, which "
                f"is no grid for each. {_HOW}"
            )
    elif isinstance(image_tokens, Merged) and isinstance(arguments.get(image_tokens.grids), Tensor):
        _equal("image", n_tokens, sum(h * w for h, w in merged_grids(image_tokens, config, arguments)))


def check_videos(
    video_tokens: VideoTokens | None, config: Any, arguments: Mapping[str, Any], n_tokens: int
) -> None:
    """As `check_images`, of a video's tokens."""
    if isinstance(video_tokens, GridFrames) and isinstance(arguments.get(video_tokens.grids), Tensor):
        videos = frames_of_videos(video_tokens, config, arguments)
        _equal("video", n_tokens, sum(h * w for video in videos for h, w in video))


def _selected(config: Any, height: int, width: int, n_class: int) -> int | None:
    """How many tokens LLaVA's projector is given of a picture: all, or but the first; None if not told."""
    strategy = getattr(config, "vision_feature_select_strategy", None)
    patch = getattr(getattr(config, "vision_config", None), "patch_size", None)
    if strategy not in ("default", "full") or not isinstance(patch, int):
        return None
    return (height // patch) * (width // patch) + n_class - (strategy == "default")


def _equal(what: str, n_tokens: int, n_wanted: int) -> None:
    if n_tokens != n_wanted:
        raise InputError(f"There are {n_tokens} {what} tokens, and the {what}s take {n_wanted}. {_HOW}")
