"""Where the features of each image lie among the words: what a family says, worked out for one batch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from mm_adapters._errors import InputError
from mm_adapters.records.image_tokens import (
    Anyres,
    ImageTokens,
    Lines,
    Merged,
    Queries,
    Square,
    Tiles,
    Views,
)

Grid = tuple[int, int]


@dataclass(frozen=True)
class ImagePosition:
    """One place that an image takes: its (row, column) in `grid`, and the tile it is of.

    Tile 0 is the whole image; others are counted from 1, line by line. `frame` is the step in time of a
    video's, None of an image's.
    """

    role: Literal["image", "newline", "query"] = "image"
    at: Grid | None = None
    grid: Grid | None = None
    tile: int = 0
    frame: int | None = None


def raster(grid: Grid, tile: int = 0, frame: int | None = None) -> list[ImagePosition]:
    """The patches of a grid, line by line."""
    return [ImagePosition("image", (r, c), grid, tile, frame) for r in range(grid[0]) for c in range(grid[1])]


def positions_of_images(
    image_tokens: ImageTokens,
    config: Any,
    prepared: Mapping[str, Any],
    tokenizer: Any,
    rows: Sequence[Sequence[int]],
    image_id: int,
) -> list[list[ImagePosition]]:
    """The places of each image of the batch in turn, in the order their tokens come.

    `prepared` are the model's arguments; `rows` the ids of each row's tokens.

    Raises: InputError if the tokens cannot be what the images take.
    """
    count = sum(list(row).count(image_id) for row in rows)
    match image_tokens:
        case Square():
            return _squares(prepared, count)
        case Queries():
            return _queries(image_tokens, config, rows, image_id)
        case Anyres():
            return [_anyres(config, prepared, i) for i in range(len(prepared["image_sizes"]))]
        case Merged():
            return [raster(grid) for grid in merged_grids(image_tokens, config, prepared)]
        case Views():
            sizes = prepared[image_tokens.grids].tolist()
            return [raster((r, c)) + raster((down, across), tile=1) for r, c, down, across in sizes]
        case Lines():
            lengths = [stop - start for row in rows for start, stop in runs(row, image_id)]
            sizes = prepared["image_sizes"].tolist()
            return [_lines(h, w, n) for (h, w), n in zip(sizes, lengths, strict=True)]
        case Tiles(marker=None):
            return _runs_of_tiles(image_tokens, config, rows, image_id)
        case Tiles():
            return _marked_tiles(image_tokens, tokenizer, rows, image_id)


def merged_grids(image_tokens: Merged, config: Any, prepared: Mapping[str, Any]) -> list[Grid]:
    """The grid of each image's tokens: its patches, joined `merge` by `merge`."""
    merge = int(config_at(config, image_tokens.merge)) if image_tokens.merge else 1
    if image_tokens.grids != "image_sizes":
        sizes = [(t * h, w) for t, h, w in prepared[image_tokens.grids].tolist()]
    else:
        patch = config_at(config, "vision_config.patch_size")
        sizes = [(h // patch, w // patch) for h, w in prepared["image_sizes"].tolist()]
    return [(h // merge, w // merge) for h, w in sizes]


def runs(ids: Sequence[int], image_id: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of each unbroken run of image tokens."""
    start: int | None = None
    for i, token in enumerate([*ids, None]):
        if token == image_id and start is None:
            start = i
        elif token != image_id and start is not None:
            yield start, i
            start = None


def _squares(prepared: Mapping[str, Any], count: int) -> list[list[ImagePosition]]:
    """As many tokens for each image, in a grid of the pixels' proportions, after any that are no patch."""
    pixels: Tensor = prepared["pixel_values"]
    n_images = math.prod(pixels.shape[:-3])
    each, left = divmod(count, n_images)
    height, width = pixels.shape[-2:]
    square = None if left else square_of(each, height, width)
    if square is not None:
        extra, grid = square
        return [[ImagePosition()] * extra + raster(grid)] * n_images
    raise InputError(
        f"There are {count} image tokens for {n_images} images of {height} x {width} pixels, which is no "
        "grid for each. Pass the tokens that the model's processor makes."
    )


def square_of(count: int, height: int, width: int) -> tuple[int, Grid] | None:
    """How many of an image's tokens are no patch, and the grid of the others; None if it is none."""
    for extra in (0, 1):  # A class token, or the mean of all patches, comes first.
        down = round(math.sqrt((count - extra) * height / width)) if count > extra else 0
        if down and (count - extra) % down == 0:
            grid = (down, (count - extra) // down)
            if abs(grid[0] * width - grid[1] * height) < max(height, width):
                return extra, grid
    return None


def _queries(
    image_tokens: Queries, config: Any, rows: Iterable[Sequence[int]], image_id: int
) -> list[list[ImagePosition]]:
    count = int(config_at(config, image_tokens.count)) if image_tokens.count else 1
    total = sum(list(row).count(image_id) for row in rows)
    return [[ImagePosition(image_tokens.role)] * count] * (total // count)


def _anyres(config: Any, prepared: Mapping[str, Any], index: int) -> list[ImagePosition]:
    """The whole image, then the lines of its tiles without the padding, a newline after each."""
    size, patch = config.vision_config.image_size, config.vision_config.patch_size
    side = size // patch
    several = prepared.get("batch_num_images")
    if several is not None and int(several.repeat_interleave(several)[index]) > 1:
        return [*raster((side, side)), ImagePosition("newline")]
    from transformers.image_processing_utils import select_best_resolution

    height, width = prepared["image_sizes"][index].tolist()
    best = select_best_resolution((height, width), config.image_grid_pinpoints)
    tiles = (best[0] // size, best[1] // size)
    down, across = tiles[0] * side, tiles[1] * side
    # The image was scaled to fit and padded on two sides; the padding is cut off again.
    pad_r = pad_c = 0
    if width / height > across / down:
        pad_r = (down - int(round(height * across / width, 7))) // 2
    else:
        pad_c = (across - int(round(width * down / height, 7))) // 2
    grid = (down - 2 * pad_r, across - 2 * pad_c)
    limit = re.search(r"anyres_max_(\d+)", str(getattr(config, "vision_aspect_ratio", "")))
    ratio = math.sqrt(grid[0] * grid[1] / (int(limit[1]) * side**2)) if limit else 0.0
    shown = (int(grid[0] // ratio), int(grid[1] // ratio)) if ratio > 1.1 else grid
    positions = raster((side, side))
    for r in range(shown[0]):
        for c in range(shown[1]):
            # The tile that the middle of this place lies in.
            tile_r = (pad_r + int((r + 0.5) * grid[0] / shown[0])) // side
            tile_c = (pad_c + int((c + 0.5) * grid[1] / shown[1])) // side
            positions.append(ImagePosition("image", (r, c), shown, 1 + tile_r * tiles[1] + tile_c))
        positions.append(ImagePosition("newline"))
    return positions


def _lines(height: int, width: int, count: int) -> list[ImagePosition]:
    """Codes of an image of so many pixels: a code stands for as many as make the count come out."""
    factors = (f for f in range(1, height + 1) if (height // f) * (width // f + 1) == count)
    factor = next(factors, None)
    if factor is None:
        raise InputError(f"{count} image tokens are no lines of an image of {height} x {width} pixels.")
    grid = (height // factor, width // factor)
    positions = raster(grid)
    for line in range(grid[0], 0, -1):
        positions.insert(line * grid[1], ImagePosition("newline"))
    return positions


def _runs_of_tiles(
    image_tokens: Tiles, config: Any, rows: Iterable[Sequence[int]], image_id: int
) -> list[list[ImagePosition]]:
    """Each run of tokens is an image: its tiles, then the whole; alone, it is the whole."""
    each = int(config_at(config, str(image_tokens.count)))
    side = math.isqrt(each)
    found = []
    for row in rows:
        for start, stop in runs(row, image_id):
            n_tiles = (stop - start) // each
            numbers = [0] if n_tiles == 1 else [*range(1, n_tiles), 0]
            tile_cells = [(tile, position.at) for tile in numbers for position in raster((side, side))]
            found.append(
                [ImagePosition("image", at, None if tile else (side, side), tile) for tile, at in tile_cells]
            )
    return found


def _marked_tiles(
    image_tokens: Tiles, tokenizer: Any, rows: Iterable[Sequence[int]], image_id: int
) -> list[list[ImagePosition]]:
    """Before each run of tokens a marker says which tile of its image it is; the whole ends an image."""
    assert image_tokens.marker is not None
    found: list[list[ImagePosition]] = []
    for row in rows:
        waiting: list[tuple[int, int, int]] = []
        for start, stop in runs(row, image_id):
            before = tokenizer.convert_ids_to_tokens(int(row[start - 1])) if start else ""
            mark = re.fullmatch(image_tokens.marker, str(before))
            side = math.isqrt(stop - start)
            if mark:
                waiting.append((int(mark[1]) - 1, int(mark[2]) - 1, side))
            else:
                found.append([*_joined(waiting), *raster((side, side))])
                waiting = []
        if waiting:
            found.append(_joined(waiting))
    return found


def _joined(tiles: Sequence[tuple[int, int, int]]) -> list[ImagePosition]:
    if not tiles:
        return []
    down, across = 1 + max(r for r, _, _ in tiles), 1 + max(c for _, c, _ in tiles)
    positions = []
    for tile_r, tile_c, side in tiles:
        grid = (down * side, across * side)
        for r in range(side):
            for c in range(side):
                at = (tile_r * side + r, tile_c * side + c)
                positions.append(ImagePosition("image", at, grid, 1 + tile_r * across + tile_c))
    return positions


def config_at(config: Any, path: str) -> Any:
    """What a configuration has at a dotted path."""
    for name in path.split("."):
        config = config[name] if isinstance(config, Mapping) else getattr(config, name)
    return config
