"""What each position of a tower's sequence is: a patch, a word, padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mm_adapters._errors import InputError, WordNotFoundError
from mm_adapters.tokens.image_positions import ImagePosition, raster
from mm_adapters.tokens.words import Word, align_words, split_words

Role = Literal[
    "class", "register", "patch", "image", "newline", "start", "end", "word", "pad", "query", "latent"
]
Grid = tuple[int, int]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class TokenLayout:
    """What stands at each position of one tower's sequence, for each row of the batch.

    `roles[row][pos]`. `patches[row][pos]` is (row, column) in the grid of patches, and
    `image_index[row][pos]` which of its row's images a position belongs to; both are None elsewhere.
    `grid` is (rows, columns), None if there is no grid or images differ; `grids[row][pos]` is that of
    each position. `tiles[row][pos]` is 0 for the whole image, and counts its tiles from 1, line by
    line: rows and columns of tiles count over the whole picture, across tiles; within the tile, with
    no grid, where it is not known how they lie. `frames[row][pos]` is the step in time of a video's
    position, None of an image's; rows and columns are those of the frame. `words[row]` are the words of
    the row's text and `marks[row]` its punctuation, each with all its positions.
    """

    roles: tuple[tuple[Role, ...], ...]
    grid: Grid | None = None
    patches: tuple[tuple[Grid | None, ...], ...] = ()
    image_index: tuple[tuple[int | None, ...], ...] = ()
    grids: tuple[tuple[Grid | None, ...], ...] = ()
    tiles: tuple[tuple[int | None, ...], ...] = ()
    frames: tuple[tuple[int | None, ...], ...] = ()
    texts: tuple[str, ...] = ()
    words: tuple[tuple[Word, ...], ...] = ()
    marks: tuple[tuple[Word, ...], ...] = ()

    @property
    def n_rows(self) -> int:
        return len(self.roles)

    @property
    def n_pos(self) -> int:
        return len(self.roles[0])

    def positions(self, role: str, row: int = 0) -> list[int]:
        """The positions of this role in one row. Raises: InputError if there is no such role."""
        if role not in get_args(Role):
            raise InputError(f"No role {role!r}; there is {', '.join(get_args(Role))}.")
        return [p for p, r in enumerate(self.roles[row]) if r == role]

    def mask(self, role: str) -> Bool[Tensor, "row pos"]:
        """True where the position has this role."""
        out = torch.zeros(self.n_rows, self.n_pos, dtype=torch.bool)
        for row in range(self.n_rows):
            out[row, self.positions(role, row)] = True
        return out

    def patch_rc(self, pos: int, *, row: int = 0) -> Grid:
        """(row, column) of the patch at a position. Raises: InputError if it is no patch."""
        place = self.patches[row][pos] if self.patches else None
        if place is None:
            raise InputError(f"Position {pos} is {self.roles[row][pos]!r}, which has no patch.")
        return place

    def tile_of(self, pos: int, *, row: int = 0) -> int:
        """The tile of the patch at a position, from 1; 0 if it is of the whole image."""
        self.patch_rc(pos, row=row)
        return (self.tiles[row][pos] or 0) if self.tiles else 0

    def box(self, pos: int, *, row: int = 0) -> Box:
        """(top, left, bottom, right) of what a position sees, as fractions of its image.

        Raises: InputError if it is no patch, or it is not known where its tile lies.
        """
        r, c = self.patch_rc(pos, row=row)
        grid = self.grids[row][pos]
        if grid is None:
            raise InputError(f"Position {pos} is of tile {self.tile_of(pos, row=row)}, of no known place.")
        return r / grid[0], c / grid[1], (r + 1) / grid[0], (c + 1) / grid[1]

    def frame_of(self, pos: int, *, row: int = 0) -> int | None:
        """The step in time of a video's position, from 0; None if it is of no video."""
        return self.frames[row][pos] if self.frames else None

    def position_of(
        self,
        patch_row: int,
        patch_col: int,
        *,
        image: int = 0,
        row: int = 0,
        tiled: bool | None = None,
        frame: int | None = None,
    ) -> int:
        """The position of a patch: of the whole image (`tiled=False`), of its tiles (True), or of
        whichever has it, the whole first; of a video's `frame`, or of the first.

        Raises: InputError if that image has no such patch.
        """
        for views in ((False, True) if tiled is None else (tiled,)) if self.patches else ():
            for pos, place in enumerate(self.patches[row]):
                here = place == (patch_row, patch_col) and self.image_index[row][pos] == image
                here = here and frame in (None, self.frame_of(pos, row=row))
                if here and bool(self.tiles and self.tiles[row][pos]) == views:
                    return pos
        size = f"the grid is {self.grid[0]} x {self.grid[1]}" if self.grid else "no single grid"
        raise InputError(f"Row {row} has no patch ({patch_row}, {patch_col}) of image {image}: {size}.")

    def row_and_position_of(self, patch_row: int, patch_col: int, *, image: int = 0) -> tuple[int, int]:
        """The row and the position of a patch of an image, where the rows are windows or tiles of images.

        Raises: InputError if that image has no such patch.
        """
        for row in range(self.n_rows):
            places = zip(self.patches[row], self.image_index[row], strict=True) if self.patches else ()
            for pos, place in enumerate(places):
                if place == ((patch_row, patch_col), image):
                    return row, pos
        raise InputError(f"No row has a patch ({patch_row}, {patch_col}) of image {image}: {self.grid}.")

    def where(self, word: str, row: int = 0, occurrence: int | None = None) -> list[int]:
        """The positions of a word or phrase, in upper or lower case: of each time it occurs, or of
        the time counted by `occurrence`, from 0.

        Raises: WordNotFoundError if the row does not have it, listing the words it has.
        """
        entries = sorted(self.words[row] + self.marks[row], key=lambda w: w.span) if self.words else []
        parts = [part.casefold() for part, _, _ in split_words(word)]
        heard = [entry.text.casefold() for entry in entries]
        starts = [i for i in range(len(heard)) if parts and heard[i : i + len(parts)] == parts]
        if not starts or (occurrence is not None and not 0 <= occurrence < len(starts)):
            times = "" if not starts else f" occurrence {occurrence}; it has {len(starts)}, from 0:"
            known = ", ".join(w.text for w in self.words[row]) if self.words else "no text"
            raise WordNotFoundError(f"Row {row} has no {word!r}{times}. Its words: {known}.")
        starts_chosen = starts if occurrence is None else [starts[occurrence]]
        positions = {p for i in starts_chosen for e in entries[i : i + len(parts)] for p in e.positions}
        return sorted(positions)


@dataclass(frozen=True)
class Position:
    """What stands at one position: its role and, of an image, where it lies there."""

    role: Role
    at: Grid | None = None
    grid: Grid | None = None
    tile: int | None = None
    image: int | None = 0
    frame: int | None = None


def layout_of_positions(rows: Sequence[Sequence[Position]], **text: Any) -> TokenLayout:
    """The layout of these positions; `text` are its fields about words."""
    has_frames = any(s.frame is not None for row in rows for s in row)
    grids = {position.grid for row in rows for position in row if position.grid is not None}
    return TokenLayout(
        roles=tuple(tuple(s.role for s in row) for row in rows),
        grid=grids.pop() if len(grids) == 1 else None,
        patches=tuple(tuple(s.at for s in row) for row in rows),
        image_index=tuple(tuple(s.image for s in row) for row in rows),
        grids=tuple(tuple(s.grid for s in row) for row in rows),
        tiles=tuple(tuple(s.tile for s in row) for row in rows),
        frames=tuple(tuple(s.frame for s in row) for row in rows) if has_frames else (),
        **text,
    )


def vision_layout(
    n_rows: int,
    grid: Grid,
    n_class: int = 1,
    n_register: int = 0,
    role: Role = "patch",
) -> TokenLayout:
    """The layout of an image's sequence: class, registers, then patches line by line.

    `role` is "latent" for the image positions of a denoiser, whose grid is that of its latents.
    """
    front = n_class + n_register
    places = [(r, c) for r in range(grid[0]) for c in range(grid[1])]
    roles = ("class",) * n_class + ("register",) * n_register + (role,) * len(places)
    row = [Position(cast(Role, name)) for name in roles[:front]] + [
        Position(role, at, grid, 0) for at in places
    ]
    return layout_of_positions([row] * n_rows)


def cut_layout(grids: Sequence[Grid], n_pos: int) -> TokenLayout:
    """The layout of images that come cut into patches, line by line, and are padded to `n_pos`."""
    rows = []
    for grid in grids:
        positions = [Position("patch", (r, c), grid, 0) for r in range(grid[0]) for c in range(grid[1])]
        rows.append([*positions, *[Position("pad", image=None)] * (n_pos - len(positions))])
    return layout_of_positions(rows)


def text_layout(
    texts: Sequence[str] | None,
    tokenizer: Any,
    input_ids: Int[Tensor, "row pos"],
    attention_mask: Tensor | None = None,
) -> TokenLayout:
    """The layout of texts: where each starts, its words, where it ends, and padding.

    Without `texts` they are decoded from the tokens. Of padding that looks like the end token, as
    CLIP's, the first is the end. A token the tokenizer does not know is a word.
    """
    return language_layout(texts, tokenizer, input_ids, attention_mask)


def language_layout(
    texts: Sequence[str] | None,
    tokenizer: Any,
    input_ids: Int[Tensor, "row pos"],
    attention_mask: Tensor | None = None,
    image_token_id: int | None = None,
    grids: Grid | Sequence[Grid] | None = None,
    n_class: int = 0,
    places: Sequence[Sequence[ImagePosition]] | None = None,
    newline_ids: Sequence[int] = (),
    video_token_id: int | None = None,
    videos: Sequence[Sequence[ImagePosition]] = (),
) -> TokenLayout:
    """As `text_layout`, with the places that images and `videos` take in the text.

    `grids` is the grid of every image, or one for each image of the batch in order; `n_class` is
    how many places of each image come before its patches. Or `places` are those of each image.
    `newline_ids` are tokens that end a line of an image.

    Raises: InputError if the image tokens are more or fewer than the images have patches.
    """
    if texts is not None and len(texts) != len(input_ids):
        raise InputError(f"There are {len(texts)} texts for {len(input_ids)} rows of tokens.")
    rows = [
        align_words(
            None if texts is None else texts[i],
            tokenizer,
            ids.tolist(),
            None if attention_mask is None else attention_mask[i].tolist(),
            [token for token in (image_token_id, video_token_id) if token is not None],
        )
        for i, ids in enumerate(input_ids)
    ]
    is_video = [
        [role == "image" and token == video_token_id for role, token in zip(row.roles, ids, strict=True)]
        for row, ids in zip(rows, input_ids.tolist(), strict=True)
    ]
    counts = [row.roles.count("image") - sum(of_row) for row, of_row in zip(rows, is_video, strict=True)]
    if places is None and grids is not None:
        each = repeat(grids) if _is_grid(grids) else grids
        endless = ([ImagePosition()] * n_class + raster(cast(Grid, grid)) for grid in each)
        images = _by_row(counts, endless, None if _is_grid(grids) else len(grids))
    elif places is not None:
        images = _by_row(counts, iter(places), len(places))
    else:
        images = [[(0, ImagePosition())] * n for n in counts]
    in_videos = _by_row([sum(of_row) for of_row in is_video], iter(videos), len(videos), "video")
    positions = []
    for i, (row, ids) in enumerate(zip(rows, input_ids.tolist(), strict=True)):
        queue = iter(_in_order(is_video[i], row.roles, images[i], in_videos[i]))
        positions.append(
            [
                _position(next(queue)) if role == "image" else _word(role, token in newline_ids)
                for role, token in zip(row.roles, ids, strict=True)
            ]
        )
    return layout_of_positions(
        positions,
        texts=tuple(row.text for row in rows),
        words=tuple(row.words for row in rows),
        marks=tuple(row.marks for row in rows),
    )


def _word(role: Role, ends_line: bool) -> Position:
    return Position("newline" if ends_line else role, image=None)


def _position(numbered: tuple[int, ImagePosition]) -> Position:
    image, image_position = numbered
    return Position(
        image_position.role,
        image_position.at,
        image_position.grid,
        image_position.tile if image_position.at else None,
        image,
        image_position.frame,
    )


def _in_order(
    is_video: Sequence[bool],
    roles: Sequence[str],
    images: Sequence[tuple[int, ImagePosition]],
    videos: Sequence[tuple[int, ImagePosition]],
) -> list[tuple[int, ImagePosition]]:
    """The places of a row's images and videos as they come, counted together."""
    queues = {False: iter(images), True: iter(videos)}
    numbers: dict[tuple[bool, int], int] = {}
    out = []
    for of_video, role in zip(is_video, roles, strict=True):
        if role == "image":
            number, place = next(queues[of_video])
            out.append((numbers.setdefault((of_video, number), len(numbers)), place))
    return out


def _is_grid(grids: Grid | Sequence[Grid]) -> bool:
    return isinstance(grids, tuple) and bool(grids) and isinstance(grids[0], int)


def _by_row(
    counts: list[int], images: Iterator[Sequence[ImagePosition]], n_images: int | None, what: str = "image"
) -> list[list[tuple[int, ImagePosition]]]:
    """For each row, (which image of the row, its place) of each of its image tokens in turn."""
    out: list[list[tuple[int, ImagePosition]]] = []
    used = 0
    for row, n in enumerate(counts):
        places: list[tuple[int, ImagePosition]] = []
        image = 0
        while len(places) < n:
            images_positions = next(images, None)
            if images_positions is None:
                break
            places += [(image, image_position) for image_position in images_positions]
            image += 1
        used += image
        if len(places) != n:
            raise InputError(
                f"Row {row} has {n} {what} tokens and its {image} {what}s take {len(places)}. Pass the "
                "grid of "
                f"each {what}, in order, and the tokens that the model's processor makes."
            )
        out.append(places)
    if n_images is not None and used < n_images:
        raise InputError(
            f"There are {n_images - used} grids more than {what}s in the tokens, which have {counts} a row. "
            f"Pass one for each {what}."
        )
    return out
