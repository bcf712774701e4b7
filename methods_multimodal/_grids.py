"""How many patches or latents an attention sees down and across: read off the model, never guessed."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from mm_adapters import HookedModel, InputError
from mm_adapters._layouts import patch_layout
from mm_adapters._tokens import Grid, TokenLayout, language_layout


def image_layout(
    model: HookedModel, pixels: Float[Tensor, "image channel height width"], tower: str = "vision"
) -> TokenLayout:
    """The layout of a vision tower's sequence for these pixels.

    Raises: InputError if the tower does not cut images into patches.
    """
    return patch_layout(model.sitemap.towers[tower], pixels)


def answer_layout(
    model: HookedModel,
    input_ids: Int[Tensor, "row pos"],
    attention_mask: Tensor | None,
    pixels: Tensor,
    tower: str = "vision",
) -> TokenLayout:
    """The layout of a language tower's sequence: which positions are which patch of the image.

    Raises: InputError if the image takes another number of places than it has patches.
    """
    name = model.sitemap.mounts.image_token
    image_id = getattr(model.wrapped.config, name) if name else None
    grid = image_layout(model, pixels, tower).grid
    assert grid is not None
    n_images = len(pixels) // len(input_ids)
    places = int((input_ids[0] == image_id).sum()) // max(n_images, 1)
    n_class = model.sitemap.towers[tower].record.n_class
    extra = n_class if places == grid[0] * grid[1] + n_class else 0
    tokenizer = model.tokenizer_of("language")
    return language_layout(None, tokenizer, input_ids, attention_mask, image_id, grid, extra)


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
