"""How many patches or latents an attention sees down and across: read off the model, never guessed."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from mm_adapters import InputError, Model, TokenLayout

Grid = tuple[int, int]


def image_layout(
    model: Model, pixels: Float[Tensor, "image channel height width"], tower: str = "vision"
) -> TokenLayout:
    """The layout of a vision tower's sequence for these pixels.

    Raises: InputError if the tower does not cut images into patches.
    """
    return model.check_tower(tower).patch_layout(pixels)


def answer_layout(
    model: Model,
    input_ids: Int[Tensor, "row pos"],
    attention_mask: Tensor | None,
    pixels: Tensor,
) -> TokenLayout:
    """The layout of a language tower's sequence: which positions are which patch of the image.

    Raises: InputError if the image takes another number of places than it has patches.
    """
    given = {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixels}
    return model.layout(**given)["language"]


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
