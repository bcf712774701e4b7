"""How an image's features lie among the words of a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Square:
    """One token for each cell of a grid that has the image's proportions (LLaVA, Gemma 3)."""


@dataclass(frozen=True)
class Queries:
    """One token for each query; a query belongs to no patch (BLIP-2).

    `count` is an attribute of the config; without it an image has one token. `mask` names the argument
    that marks these positions, where no token does.
    """

    count: str | None = None
    role: Literal["query", "image"] = "query"
    mask: str | None = None


@dataclass(frozen=True)
class Anyres:
    """The whole image, then its tiles as one grid with a newline after each line (LLaVA-NeXT)."""


@dataclass(frozen=True)
class Merged:
    """Patches of an image of any size, joined `merge` by `merge` (Qwen2-VL, Pixtral).

    `grids` is the argument that has each image's size: in patches, or "image_sizes", in pixels.
    `merge` is an attribute of the config. `newlines` are tokens that end a line or an image.
    """

    grids: str = "image_grid_thw"
    merge: str | None = None
    newlines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tiles:
    """An image's tiles, then the whole image, each a square of tokens (Idefics3, InternVL).

    `marker` matches the token before a tile and holds its row and column, from 1. Without it the tiles lie
    end to end, with `count` (of the config) tokens each, and how they were cut is unknown.
    """

    marker: str | None = None
    count: str | None = None


@dataclass(frozen=True)
class Lines:
    """Codes of an image of any size, with a newline after each line (Emu3)."""


@dataclass(frozen=True)
class Views:
    """The whole image, then it again, finer (Molmo 2).

    `grids` is the argument with the rows and columns of both; `newlines` are tokens that end a line.
    """

    grids: str
    newlines: tuple[str, ...] = ()


@dataclass(frozen=True)
class GridFrames:
    """The frames of a video one after another, each merged as an image is (Qwen2-VL).

    `grids` is the argument with each video's steps in time, rows and columns, in patches; `merge` is an
    attribute of the config.
    """

    grids: str = "video_grid_thw"
    merge: str = "vision_config.spatial_merge_size"


@dataclass(frozen=True)
class PooledFrames:
    """The frames of a video, each pooled to half its side, then a newline (LLaVA-OneVision).

    `pixels` is the argument with the frames, [video, frame, channel, height, width].
    """

    pixels: str = "pixel_values_videos"


VideoTokens = GridFrames | PooledFrames
ImageTokens = Square | Queries | Anyres | Merged | Tiles | Lines | Views
