"""What each position of each tower is, for inputs that are raw or prepared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mm_adapters._errors import InputError
from mm_adapters.layouts.of_stages import stage_layouts
from mm_adapters.records.image_tokens import (
    Anyres,
    GridFrames,
    ImageTokens,
    Merged,
    Queries,
    Square,
    Tiles,
    Views,
)
from mm_adapters.records.stages import Stages
from mm_adapters.sites.site_map import SiteMap
from mm_adapters.sites.tower_view import TowerView
from mm_adapters.tokens.by_part import Layouts
from mm_adapters.tokens.image_positions import Grid, ImagePosition, merged_grids, positions_of_images
from mm_adapters.tokens.layout import (
    TokenLayout,
    language_layout,
    text_layout,
)
from mm_adapters.tokens.patch_order import all_tiles, by_cell, by_tile, end_to_end
from mm_adapters.tokens.video_positions import frames_of_videos, positions_of_videos

_NO_TOKEN = -1  # Stands for image tokens that a mask marks.
_VIDEO = "pixel_values_videos"


def _count(number: object) -> int:
    assert isinstance(number, int), "A mounted tower's record is settled."
    return number


def layouts(
    model: Any, sites: SiteMap, tokenizer_of: Any, prepared: Mapping[str, Any], texts: Sequence[str] | None
) -> Layouts:
    """The layout of every tower whose inputs are among `prepared`, the wrapped model's arguments.

    `texts` are what the tokens were made of, where that is known; they are decoded otherwise.
    """
    by_tower: dict[str, TokenLayout] = {}
    vision = next((t for t in sites.towers.values() if t.record.role == "vision"), None)
    pixels = None if vision is None else prepared.get(vision.input_name)
    images: list[list[ImagePosition]] | None = None
    for name, tower in sites.towers.items():
        tokens = prepared.get(tower.input_name)
        if tokens is None or tower.record.role not in ("text", "language"):
            continue
        tokenizer = tokenizer_of(name)
        if tokenizer is None:
            raise InputError(
                f"The {name} tower has no tokenizer, so its tokens have no words. "
                "Pass one: mm_adapters.wrap(model, tokenizer=...)."
            )
        image_tokens, videos = _image_tokens_of(sites, vision), _videos(model, sites, prepared)
        mask = prepared.get("attention_mask") if tokens.shape == _shape(prepared) else None
        sees = pixels is not None or bool(videos)
        if vision is None or not sees or image_tokens is None or images is not None:
            by_tower[name] = text_layout(texts, tokenizer, tokens, mask)
            continue
        ids, image_id = _image_tokens(model, sites, image_tokens, tokens, prepared)
        images = []
        if pixels is not None:
            images = positions_of_images(
                image_tokens, model.config, prepared, tokenizer, ids.tolist(), image_id
            )
        ends = image_tokens.newlines if isinstance(image_tokens, Merged | Views) else ()
        newline_ids = [tokenizer.convert_tokens_to_ids(token) for token in ends]
        by_tower[name] = language_layout(
            texts,
            tokenizer,
            ids,
            mask,
            image_id,
            places=images,
            newline_ids=newline_ids,
            video_token_id=_video_id(model, sites),
            videos=videos,
        )
    if vision is None or (pixels is None and sites.model_record.videos is None):
        return Layouts(by_tower)
    order = vision.record.order
    if isinstance(order, Stages) and pixels is not None:
        return Layouts(stage_layouts(vision, order, pixels, vision.patch_grid(pixels)) | by_tower)
    if isinstance(sites.model_record.videos, GridFrames):
        of_vision = _packed_frames(model, sites.model_record.videos, vision, prepared)
    else:
        of_vision = None if pixels is None else _vision(model, sites, vision, prepared, images)
    return Layouts(by_tower if of_vision is None else {vision.name: of_vision} | by_tower)


def _image_tokens_of(sites: SiteMap, vision: TowerView | None) -> ImageTokens | None:
    model_record = sites.model_record
    image_tokens = model_record.images or (vision.record.images if vision else None)
    if image_tokens is None and model_record.image_token is not None:
        return Square()
    return image_tokens


def _image_tokens(
    model: Any, sites: SiteMap, image_tokens: ImageTokens, ids: Tensor, prepared: Mapping[str, Any]
) -> tuple[Tensor, int]:
    """The tokens, and the one that stands for images."""
    if isinstance(image_tokens, Queries) and image_tokens.mask is not None:
        return ids.masked_fill(prepared[image_tokens.mask].bool(), _NO_TOKEN), _NO_TOKEN
    return ids, int(getattr(model.config, str(sites.model_record.image_token)))


def _videos(model: Any, sites: SiteMap, prepared: Mapping[str, Any]) -> list[list[ImagePosition]]:
    """The places of each video of the batch, in order; none if there are no videos."""
    if prepared.get(_VIDEO) is None:
        return []
    record = sites.model_record.videos
    if record is None:
        raise InputError(
            f"{sites.family} does not say how the tokens of a video lie among the words. Leave {_VIDEO} "
            "out, or "
            "ask for the layout of pictures."
        )
    return positions_of_videos(record, model.config, prepared)


def _video_id(model: Any, sites: SiteMap) -> int | None:
    name = sites.model_record.video_token
    return None if name is None else getattr(model.config, name, None)


def _packed_frames(
    model: Any, videos: GridFrames, vision: TowerView, prepared: Mapping[str, Any]
) -> TokenLayout | None:
    """One row: the patches of all images, then those of all videos, frame by frame, as the tower has them."""
    merge, window = _cells(model.config, windows=vision.record.order == "windows")
    grids: list[Grid] = []
    frames: list[tuple[int, int | None]] = []
    if prepared.get(vision.input_name) is not None:
        grids += merged_grids(Merged(), model.config, prepared)
        frames += [(image, None) for image in range(len(grids))]
    if prepared.get(_VIDEO) is not None:
        first = len(grids)
        for i, video in enumerate(frames_of_videos(videos, model.config, prepared, merged=False)):
            grids += video
            frames += [(first + i, frame) for frame in range(len(video))]
    return by_cell(grids, merge, window, frames) if grids else None


def _vision(
    model: Any,
    sites: SiteMap,
    vision: TowerView,
    prepared: Mapping[str, Any],
    images: list[list[ImagePosition]] | None,
) -> TokenLayout | None:
    """The layout of the vision tower, whatever order it keeps its patches in; None if it has none."""
    pixels: Tensor = prepared[vision.input_name]
    image_tokens, order = _image_tokens_of(sites, vision), vision.record.order
    n_class = _count(vision.record.n_class)
    if vision.record.grids is not None:
        return vision.patch_layout(pixels, prepared.get(vision.record.grids))
    config: Any = getattr(model, "config", None)
    if order == "end to end":
        return end_to_end(merged_grids(Merged("image_sizes"), config, prepared))
    if vision.record.patch is None:
        return None
    if _count(vision.record.n_register):
        return vision.patch_layout(pixels)
    grid = vision.patch_grid(pixels)
    if order == "tiles":
        shapes: Any = [(1, 1), *config.vision_config.supported_aspect_ratios]  # 0 is no image.
        cuts = [(r, c) for r, c in (shapes[i] for i in prepared["aspect_ratio_ids"].flatten().tolist())]
        return all_tiles(grid, n_class, cuts, pixels.shape[-4])
    if isinstance(image_tokens, Anyres | Tiles) and images is not None:
        numbers = [_tile_numbers(image_positions, image_tokens) for image_positions in images]
        tiles = [tile for of_one in numbers for tile in of_one]
        index = [i for i, of_one in enumerate(numbers) for _ in of_one]
        return by_tile(grid, n_class, len(tiles), tiles, index)
    rows = len(pixels)
    if pixels.ndim == 5:
        rows = int((pixels.flatten(0, 1).flatten(1) != 0).any(1).sum())  # Padding is all zeros.
    return by_tile(grid, n_class, rows)


def _tile_numbers(positions: Sequence[ImagePosition], image_tokens: ImageTokens) -> list[int]:
    """The tiles of one image, in the order that the vision tower is given them."""
    tiles = dict.fromkeys(position.tile for position in positions if position.at is not None)
    return [*range(max(tiles) + 1)] if isinstance(image_tokens, Anyres) else list(tiles)


def _cells(config: Any, *, windows: bool) -> tuple[int, int | None]:
    """How many patches a side are merged, and how many merged cells a side a window has."""
    vision = config.vision_config
    merge = vision.spatial_merge_size
    return merge, vision.window_size // merge // vision.patch_size if windows else None


def _shape(prepared: Mapping[str, Any]) -> Any:
    mask = prepared.get("attention_mask")
    return None if mask is None else mask.shape
