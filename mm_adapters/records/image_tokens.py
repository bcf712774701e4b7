"""How an image's features lie among the words: what a family can say of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Square:
    """An image takes one place for each cell of a grid that has its proportions (LLaVA, Gemma 3)."""


@dataclass(frozen=True)
class Queries:
    """An image takes as many places as there are queries, which belong to no patch (BLIP-2).

    `count` is an attribute of the config; without it an image has one place. `mask` names the
    argument that marks the places, where no token does.
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
    """An image's tiles, then the whole, each a square of places (Idefics3, InternVL).

    `marker` matches the token before a tile and has its row and column, from 1. Without it tiles lie
    end to end, `count` (of the config) places each, and nobody says how they were cut.
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


ImageTokens = Square | Queries | Anyres | Merged | Tiles | Lines | Views
