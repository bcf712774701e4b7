"""Where a picture's tokens stand, and which tokens are padding, in small cases that can be drawn."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mm_adapters import InputError
from mm_adapters.records.image_tokens import Tiles
from mm_adapters.tokens.image_positions import (
    ImagePosition,
    _anyres,
    _lines,
    _marked_tiles,
    _squares,
    square_of,
)
from mm_adapters.tokens.words import _not_padding


def at(positions: list[ImagePosition]) -> list[Any]:
    return [position.at for position in positions]


@pytest.mark.parametrize(
    ("count", "height", "width", "want"),
    [
        (4, 10, 10, (0, (2, 2))),
        (5, 10, 10, (1, (2, 2))),
        (8, 10, 20, (0, (2, 4))),
        (8, 20, 10, (0, (4, 2))),
        (1, 10, 10, (0, (1, 1))),
        (2, 10, 10, (1, (1, 1))),
        (7, 10, 10, None),
        (8, 10, 10, None),
        (0, 10, 10, None),
    ],
)
def test_so_many_tokens_are_a_grid_of_the_pictures_proportions(
    count: int, height: int, width: int, want: Any
) -> None:
    assert square_of(count, height, width) == want


def test_each_picture_has_its_grid_or_it_is_an_error() -> None:
    pixels = {"pixel_values": torch.zeros(2, 3, 10, 20)}
    for image in _squares(pixels, 16):
        assert at(image) == [(r, c) for r in range(2) for c in range(4)]
    assert at(_squares(pixels, 18)[1])[:2] == [None, (0, 0)]
    for count in (17, 10):
        says = f"^There are {count} image tokens for 2 images of 10 x 20 pixels, which is no grid for each"
        with pytest.raises(InputError, match=says):
            _squares(pixels, count)


@pytest.mark.parametrize("size", [(2, 8), (8, 2), (1, 8), (6, 8), (8, 7), (4, 4), (3, 12)])
def test_the_padding_of_tiles_is_cut_off_as_the_library_does(size: tuple[int, int]) -> None:
    """Tiles of 4 x 4 patches, each patch with its tile's number, through the library's own function."""
    from transformers.image_processing_utils import select_best_resolution
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    pinpoints = [[4, 8], [8, 4], [8, 8], [4, 4], [4, 12]]
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=4, patch_size=1), image_grid_pinpoints=pinpoints
    )
    positions = _anyres(config, {"image_sizes": torch.tensor([list(size)])}, 0)
    assert at(positions[:16]) == [(r, c) for r in range(4) for c in range(4)]
    assert {p.tile for p in positions[:16]} == {0}
    down, across = select_best_resolution(size, pinpoints)
    tiles = torch.arange(1, 1 + down * across // 16).view(down // 4, across // 4)
    numbered = tiles.repeat_interleave(4, 0).repeat_interleave(4, 1)[None]
    shown = unpad_image(numbered, size)[0]
    lines: list[list[int]] = [[]]
    for position in positions[16:]:
        if position.role == "newline":
            lines.append([])
        else:
            assert position.at == (len(lines) - 1, len(lines[-1]))
            lines[-1].append(position.tile)
    assert lines[:-1] == shown.tolist()
    assert lines[-1] == []


def test_a_code_stands_for_as_many_pixels_as_make_the_count_come_out() -> None:
    """8 x 6 pixels: 2 x 2 a code is 4 lines of 3 codes and a newline each."""
    positions = _lines(8, 6, 16)
    assert at(positions) == [x for r in range(4) for x in [(r, 0), (r, 1), (r, 2), None]]
    assert [p.role for p in positions[3::4]] == ["newline"] * 4
    assert len(_lines(8, 6, 56)) == 56
    for count in (15, 17, 57):
        with pytest.raises(
            InputError, match=f"^{count} image tokens are no lines of an image of 8 x 6 pixels"
        ):
            _lines(8, 6, count)


def test_tiles_that_no_whole_ends_are_a_picture_of_their_own() -> None:
    """9 is a patch; 1r1c1 and 1r1c2 mark two tiles of one patch, "whole" the whole of four."""
    names = {1: "r1c1", 2: "r1c2", 3: "whole", 4: "r2c1"}
    tokenizer = SimpleNamespace(convert_ids_to_tokens=lambda i: names.get(i, "x"))
    tiles = Tiles(marker=r"r(\d)c(\d)")
    whole, cut, alone = _marked_tiles(tiles, tokenizer, [[1, 9, 2, 9, 3, 9, 9, 9, 9, 1, 9, 4, 9], [9, 5]], 9)
    assert at(whole) == [(0, 0), (0, 1), (0, 0), (0, 1), (1, 0), (1, 1)]
    assert [p.tile for p in whole] == [1, 2, 0, 0, 0, 0]
    assert at(cut) == [(0, 0), (1, 0)]
    assert [(p.tile, p.grid) for p in cut] == [(1, (2, 1)), (2, (2, 1))]
    assert at(alone) == [(0, 0)]


T, F = True, False


@pytest.mark.parametrize(
    ("ids", "mask", "pad", "start", "end", "want"),
    [
        ([0, 5, 0], None, None, 1, 2, [T, T, T]),  # No padding token.
        ([0, 0, 5, 6], None, 0, 1, 2, [F, F, T, T]),
        ([5, 6, 0, 0], None, 0, 1, 2, [T, T, F, F]),
        ([5, 6, 0, 0], None, 0, 1, 0, [T, T, T, F]),  # The first of them is the end.
        ([5, 6], None, 0, 1, 0, [T, T]),
        ([0, 0, 5, 6], None, 0, 0, 2, [F, T, T, T]),  # The last of them is the start.
        ([5, 6, 0], None, 0, 0, 2, [T, T, F]),
        ([0, 0, 0], None, 0, 1, 2, [T, F, F]),
        ([0, 5, 6, 0], [0, 1, 1, 1], 0, 1, 2, [F, T, T, T]),  # The mask tells.
        ([0, 5, 6, 0], [1, 1, 1, 1], 0, 1, 2, [F, T, T, F]),  # It hides nothing, so tokens tell.
    ],
)
def test_which_tokens_are_padding(
    ids: list[int], mask: list[int] | None, pad: int | None, start: int, end: int, want: list[bool]
) -> None:
    view: Any = SimpleNamespace(pad=pad, start=start, end=end)
    assert _not_padding(ids, mask, view) == want
