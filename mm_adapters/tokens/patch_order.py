"""The order in which a vision tower keeps the patches of a batch's images: one function for each."""

from __future__ import annotations

from collections.abc import Sequence

from mm_adapters.tokens.image_positions import Grid, ImagePosition, raster
from mm_adapters.tokens.layout import Position, TokenLayout, layout_of_positions

CLASS, PAD = Position("class"), Position("pad")
_PADDED = Position("pad", image=None)


def _patch(position: ImagePosition, image: int) -> Position:
    return Position("patch", position.at, position.grid, position.tile, image)


def by_tile(
    grid: Grid,
    n_class: int,
    n_rows: int,
    tiles: Sequence[int] | None = None,
    images: Sequence[int] | None = None,
) -> TokenLayout:
    """A row for each image, or tile: class tokens, then patches line by line.

    `tiles` and `images` say which tile of which of the batch's images a row is. Rows and columns of a
    tile count within it, as the tower sees it.
    """
    rows = []
    for row in range(n_rows):
        image, tile = images[row] if images else 0, tiles[row] if tiles else 0
        front = [Position("class", tile=tile, image=image)] * n_class
        grid_of_image = None if tile else grid  # Where a tile lies is said by the language tower's layout.
        rows.append(front + [Position("patch", s.at, grid_of_image, tile, image) for s in raster(grid)])
    return layout_of_positions(rows)


def end_to_end(grids: Sequence[Grid]) -> TokenLayout:
    """One row: the patches of all images, each line by line."""
    return layout_of_positions(
        [[_patch(position, i) for i, grid in enumerate(grids) for position in raster(grid)]]
    )


def by_cell(
    grids: Sequence[Grid],
    merge: int,
    window: int | None = None,
    frames: Sequence[tuple[int, int | None]] = (),
) -> TokenLayout:
    """One row: the patches of all images, by cells of `merge` x `merge` that become one token later.

    With `window`, cells come by windows of so many cells a side, those at the edge smaller. `frames` says
    of which image or video each grid is, and which frame of the video.
    """
    positions = []
    for number, grid in enumerate(grids):
        image, frame = frames[number] if frames else (number, None)
        down, across = grid[0] // merge, grid[1] // merge
        cells = [(r, c) for r in range(down) for c in range(across)]
        if window is not None:
            cells.sort(key=lambda cell: (cell[0] // window, cell[1] // window, cell))
        for r, c in cells:
            for i in range(merge):
                for j in range(merge):
                    positions.append(Position("patch", (r * merge + i, c * merge + j), grid, 0, image, frame))
    return layout_of_positions([positions])


def by_window(grid: Grid, n_images: int, side: int, shift: int) -> TokenLayout:
    """A row for each window of each image: patches line by line, and padding.

    The grid is padded below and at the right to whole windows of `side` patches a side, and rolled up and
    left by `shift`: what it loses there comes back at the other end. The layout says of which image of the
    batch a window is.
    """
    down, across = (-(-n // side) * side for n in grid)
    rows = []
    for image in range(n_images):
        positions = {
            (r, c): Position("patch", (r, c), grid, 0, image) if r < grid[0] and c < grid[1] else _PADDED
            for r in range(down)
            for c in range(across)
        }
        for top in range(shift, down + shift, side):
            for left in range(shift, across + shift, side):
                cells = [(top + i, left + j) for i in range(side) for j in range(side)]
                rows.append([positions[r % down, c % across] for r, c in cells])
    return layout_of_positions(rows)


def all_tiles(side: Grid, n_class: int, cuts: Sequence[Grid], n_tiles: int, multiple: int = 8) -> TokenLayout:
    """A row for each image: its tiles one after another, each padded, and tiles that are padding.

    `cuts` are (rows, columns) of each image's tiles. Each tile has its class tokens, then patches, and
    as much padding as makes it a `multiple`.
    """
    length = n_class + side[0] * side[1]
    padding = [PAD] * (-length % multiple)
    rows = []
    for down, across in cuts:
        row: list[Position] = []
        whole = (down * side[0], across * side[1])
        for tile in range(n_tiles):
            if tile >= down * across:
                row += [PAD] * length + padding
                continue
            at, number = divmod(tile, across), tile + 1 if down * across > 1 else 0
            row += [Position("class", tile=number)] * n_class
            for r in range(side[0]):
                for c in range(side[1]):
                    place = (at[0] * side[0] + r, at[1] * side[1] + c)
                    row.append(Position("patch", place, whole, number))
            row += padding
        rows.append(row)
    return layout_of_positions(rows)
