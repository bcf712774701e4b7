"""How many patches or latents an attention sees down and across: read off the model, never guessed."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from mm_adapters import InputError, MissingSiteError, Model, TokenLayout

Grid = tuple[int, int]


def image_layout(
    model: Model, pixels: Float[Tensor, "image channel height width"], tower: str = "vision"
) -> TokenLayout:
    """The layout of a vision tower's sequence for these pixels.

    Raises: MissingSiteError if the tower does not cut images into patches.
    """
    return model.check_tower(tower).patch_layout(pixels)


def answer_layout(
    model: Model,
    input_ids: Int[Tensor, "row pos"],
    attention_mask: Tensor | None,
    pixels: Tensor,
) -> TokenLayout:
    """The layout of a language tower's sequence: which positions are which patch of the image.

    Raises: InputError if the image takes another number of positions than it has patches.
    """
    prepared = {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixels}
    return model.layout(**prepared)["language"]


def patch_positions(layout: TokenLayout, tower: str) -> list[list[int]]:
    """The positions of each row that stand for a patch of the image.

    Raises: MissingSiteError if there are none in any row.
    """
    rows = [[p for p, patch in enumerate(row) if patch is not None] for row in layout.patches]
    if not any(rows):
        roles = ", ".join(dict.fromkeys(role for row in layout.roles for role in row))
        raise MissingSiteError(
            f"The {tower} tower's layout has no 'patch' role: none of its positions ({roles}) is a patch's."
        )
    return rows


def one_grid(layout: TokenLayout, tower: str) -> tuple[list[int], Grid]:
    """The positions of the patches, the same in every row, and their grid.

    Raises: MissingSiteError if there are none; InputError if they are not one image's, on one grid.
    """
    columns = patch_positions(layout, tower)[0]
    if any(patches != layout.patches[0] for patches in layout.patches):
        raise InputError("The rows have their patches at different positions: read them one by one.")
    if layout.grid is None or len(columns) != layout.grid[0] * layout.grid[1]:
        raise InputError(f"{len(columns)} patches and a grid {layout.grid}: a map needs one image, one grid.")
    return columns, layout.grid


def latent_grid(n_positions: int, latent: Grid) -> Grid:
    """The height and width of a denoiser block with this many positions, halved from the latent's.

    A convolution of stride 2 rounds up, so this does.

    Raises: InputError if no halving of the latent has so many positions.
    """
    height, width = latent
    while height * width > n_positions:
        height, width = (height + 1) // 2, (width + 1) // 2
    if height * width != n_positions:
        raise InputError(
            f"A block attends from {n_positions} positions, which is no halving of the {latent[0]} x "
            f"{latent[1]} latent."
        )
    return height, width
