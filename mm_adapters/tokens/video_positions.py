"""Where the features of each video lie among the words, frame by frame."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mm_adapters.records.image_tokens import GridFrames, PooledFrames, VideoTokens
from mm_adapters.tokens.image_positions import Grid, ImagePosition, config_at, raster


def positions_of_videos(
    video_tokens: VideoTokens, config: Any, prepared: Mapping[str, Any]
) -> list[list[ImagePosition]]:
    """The places of each video of the batch in turn, in the order their tokens come."""
    match video_tokens:
        case GridFrames():
            grids = frames_of_videos(video_tokens, config, prepared)
            return [[p for i, grid in enumerate(video) for p in raster(grid, frame=i)] for video in grids]
        case PooledFrames():
            n_videos, n_frames = prepared[video_tokens.pixels].shape[:2]
            vision = config.vision_config
            side = math.ceil(vision.image_size // vision.patch_size / 2)
            frames = [p for i in range(n_frames) for p in raster((side, side), frame=i)]
            return [[*frames, ImagePosition("newline")]] * n_videos


def frames_of_videos(
    video_tokens: GridFrames, config: Any, prepared: Mapping[str, Any], *, merged: bool = True
) -> list[list[Grid]]:
    """The grid of each frame of each video: of its tokens, or of its patches."""
    merge = int(config_at(config, video_tokens.merge)) if merged else 1
    return [[(h // merge, w // merge)] * t for t, h, w in prepared[video_tokens.grids].tolist()]
