"""What each position of a tower's sequence is: a patch, a word, padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mm_adapters._errors import InputError, WordNotFoundError
from mm_adapters._words import Word, spell, split_words

Role = Literal["class", "register", "patch", "image", "start", "end", "word", "pad", "query", "latent"]
Grid = tuple[int, int]


@dataclass(frozen=True)
class TokenLayout:
    """What stands at each position of one tower's sequence, for each row of the batch.

    `roles[row][pos]`. `patches[row][pos]` is (row, column) in the grid of patches, and
    `image_index[row][pos]` which of its row's images a position belongs to; both are None elsewhere.
    `grid` is (rows, columns), None if there is no grid or images differ. `words[row]` are the
    words of the row's text and `marks[row]` its punctuation, each with all its positions.
    """

    roles: tuple[tuple[Role, ...], ...]
    grid: Grid | None = None
    patches: tuple[tuple[Grid | None, ...], ...] = ()
    image_index: tuple[tuple[int | None, ...], ...] = ()
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
        """The positions of this role in one row. Raises: ValueError if there is no such role."""
        if role not in get_args(Role):
            raise ValueError(f"No role {role!r}; there is {', '.join(get_args(Role))}.")
        return [p for p, r in enumerate(self.roles[row]) if r == role]

    def mask(self, role: str) -> Bool[Tensor, "row pos"]:
        """True where the position has this role."""
        out = torch.zeros(self.n_rows, self.n_pos, dtype=torch.bool)
        for row in range(self.n_rows):
            out[row, self.positions(role, row)] = True
        return out

    def patch_rc(self, pos: int, *, row: int = 0) -> Grid:
        """(row, column) of the patch at a position. Raises: ValueError if it is no patch."""
        place = self.patches[row][pos] if self.patches else None
        if place is None:
            raise ValueError(f"Position {pos} is {self.roles[row][pos]!r}, which has no patch.")
        return place

    def position_of(self, patch_row: int, patch_col: int, *, image: int = 0, row: int = 0) -> int:
        """The position of a patch. Raises: ValueError if that image has no such patch."""
        if self.patches:
            for pos, place in enumerate(self.patches[row]):
                if place == (patch_row, patch_col) and self.image_index[row][pos] == image:
                    return pos
        size = f"the grid is {self.grid[0]} x {self.grid[1]}" if self.grid else "no single grid"
        raise ValueError(f"Row {row} has no patch ({patch_row}, {patch_col}) of image {image}: {size}.")

    def where(self, word: str, row: int = 0, occurrence: int | None = None) -> list[int]:
        """The positions of a word or phrase, in upper or lower case: of each time it occurs, or of
        the time counted by `occurrence`, from 0.

        Raises: WordNotFoundError if the row does not have it, listing the words it has.
        """
        entries = sorted(self.words[row] + self.marks[row], key=lambda w: w.span) if self.words else []
        wanted = [part.casefold() for part, _, _ in split_words(word)]
        heard = [entry.text.casefold() for entry in entries]
        starts = [i for i in range(len(heard)) if wanted and heard[i : i + len(wanted)] == wanted]
        if not starts or (occurrence is not None and not 0 <= occurrence < len(starts)):
            times = "" if not starts else f" occurrence {occurrence}; it has {len(starts)}, from 0:"
            known = ", ".join(w.text for w in self.words[row]) if self.words else "no text"
            raise WordNotFoundError(f"Row {row} has no {word!r}{times}. Its words: {known}.")
        chosen = starts if occurrence is None else [starts[occurrence]]
        found = {p for i in chosen for e in entries[i : i + len(wanted)] for p in e.positions}
        return sorted(found)


def vision_layout(
    n_rows: int, grid: Grid, n_class: int = 1, n_register: int = 0, role: Role = "patch"
) -> TokenLayout:
    """The layout of an image's sequence: class, registers, then patches line by line.

    `role` is "latent" for the image positions of a denoiser, whose grid is that of its latents.
    """
    front = n_class + n_register
    places = [(r, c) for r in range(grid[0]) for c in range(grid[1])]
    roles = ("class",) * n_class + ("register",) * n_register + (role,) * len(places)
    return TokenLayout(
        roles=(cast(tuple[Role, ...], roles),) * n_rows,
        grid=grid,
        patches=((None,) * front + tuple(places),) * n_rows,
        image_index=((0,) * len(roles),) * n_rows,
    )


def cut_layout(grids: Sequence[Grid], n_pos: int) -> TokenLayout:
    """The layout of images that come cut into patches, line by line, and are padded to `n_pos`."""
    roles, patches = [], []
    for rows, columns in grids:
        places = [(r, c) for r in range(rows) for c in range(columns)]
        n_pad = n_pos - len(places)
        roles.append(("patch",) * len(places) + ("pad",) * n_pad)
        patches.append((*places, *(None,) * n_pad))
    index = tuple(tuple(None if p is None else 0 for p in row) for row in patches)
    return TokenLayout(tuple(roles), _one_grid(grids), tuple(patches), index)


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
) -> TokenLayout:
    """As `text_layout`, with the places that images take in the text.

    `grids` is the grid of every image, or one for each image of the batch in order; `n_class` is
    how many places of each image come before its patches.

    Raises: InputError if the image tokens are more or fewer than the images have patches.
    """
    if texts is not None and len(texts) != len(input_ids):
        raise InputError(f"There are {len(texts)} texts for {len(input_ids)} rows of tokens.")
    rows = [
        spell(
            None if texts is None else texts[i],
            tokenizer,
            ids.tolist(),
            None if attention_mask is None else attention_mask[i].tolist(),
            image_token_id,
        )
        for i, ids in enumerate(input_ids)
    ]
    counts = [row.roles.count("image") for row in rows]
    single = None if grids is None else _one_grid(grids)
    images = _image_places(counts, grids, n_class)
    patches, index = [], []
    for row, places in zip(rows, images, strict=True):
        spots = iter(places)
        filled = [next(spots) if role == "image" else (None, None) for role in row.roles]
        patches.append(tuple(place for place, _ in filled))
        index.append(tuple(image for _, image in filled))
    return TokenLayout(
        roles=tuple(row.roles for row in rows),
        grid=single,
        patches=tuple(patches),
        image_index=tuple(index),
        texts=tuple(row.text for row in rows),
        words=tuple(row.words for row in rows),
        marks=tuple(row.marks for row in rows),
    )


def _one_grid(grids: Grid | Sequence[Grid]) -> Grid | None:
    if isinstance(grids, tuple) and grids and isinstance(grids[0], int):
        return cast(Grid, grids)
    return cast(Grid, grids[0]) if len(set(grids)) == 1 else None


def _image_places(
    counts: list[int], grids: Grid | Sequence[Grid] | None, n_class: int
) -> list[list[tuple[Grid | None, int | None]]]:
    """For each row, (patch, which image) of each of its image tokens in turn."""
    if grids is None:
        return [[(None, 0)] * n for n in counts]
    each = not (isinstance(grids, tuple) and grids and isinstance(grids[0], int))
    queue = iter(cast(Sequence[Grid], grids)) if each else repeat(cast(Grid, grids))
    out: list[list[tuple[Grid | None, int | None]]] = []
    for row, n in enumerate(counts):
        places: list[tuple[Grid | None, int | None]] = []
        image = 0
        while len(places) < n:
            grid = next(queue, None)
            if grid is None:
                break
            places += [(None, image)] * n_class
            places += [((r, c), image) for r in range(grid[0]) for c in range(grid[1])]
            image += 1
        if len(places) != n:
            raise InputError(
                f"Row {row} has {n} image tokens and its {image} images take {len(places)} "
                f"(grids {grids}). Pass the grid of each image, in order."
            )
        out.append(places)
    if each and (left := len(list(queue))):
        raise InputError(
            f"There are {left} grids more than images in the tokens, which have {counts} a row. Pass one "
            "for each image."
        )
    return out
