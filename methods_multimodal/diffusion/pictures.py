"""Pictures of a pipeline: decoded from latents, or from what it gives."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from methods_multimodal.diffusion.sampling import sampling_of
from mm_adapters import InputError, MissingSiteError, Model
from mm_adapters.records import Sampling


def check_pictures(model: Model, tower: str | None = None) -> tuple[str, Sampling]:
    """The loop that is meant, and what it denoises. Raises: MissingSiteError if that makes no pictures."""
    tower, sampling = sampling_of(model, tower)
    if not sampling.pictures:
        raise MissingSiteError(
            f"The loop of {tower!r} makes embeddings in {model.name}, which have no picture."
        )
    return tower, sampling


@torch.no_grad()
def decode(
    model: Model,
    latents: Float[Tensor, "row ..."],
    *,
    grid: tuple[int, int] | None = None,
    tower: str | None = None,
) -> Float[Tensor, "row 3 height width"]:
    """Latents as pictures in 0..1, through the pipeline's own autoencoder; pixels as they are without one.

    `grid` is the rows and columns of positions, of a model whose positions hold packed latents.
    `tower` is the loop whose latents they are, the record's own by default.

    Raises: MissingSiteError if that loop makes no pictures; InputError if packed latents come without a grid.
    """
    tower, sampling = check_pictures(model, tower)
    if sampling.packed:
        if grid is None:
            raise InputError(f"{model.name} packs its latents into positions. Give grid=(rows, columns).")
        unpacked = "row (down across) (channel p q) -> row channel (down p) (across q)"
        latents = rearrange(latents, unpacked, down=grid[0], p=2, q=2)
    pixels = (
        latents if "vae" not in model.towers else _decoded(model, latents, sampling.scaled, sampling.decode)
    )
    return (pixels / 2 + 0.5).clamp(0, 1).float().cpu()


def pictures_of(model: Model, output: Any) -> Float[Tensor, "row 3 height width"]:
    """The pictures, in 0..1, of a pipeline that was run with `output_type="pt"`; gradients follow.

    Raises: MissingSiteError if the pipeline makes none.
    """
    _, sampling = check_pictures(model)
    images = output.images
    if not isinstance(images, Tensor):  # Of pipelines that give arrays whatever they are asked for (unCLIP).
        images = rearrange(torch.as_tensor(images), "row height width channel -> row channel height width")
    return (images / 2 + 0.5).clamp(0, 1) if sampling.signed else images


def to_array(picture: Float[Tensor, "3 height width"]) -> Any:
    """A picture as matplotlib and Pillow take it: [height, width, 3] bytes."""
    return (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()


def _decoded(model: Model, latents: Tensor, scaled: str | None, options: Any) -> Tensor:
    autoencoder: Any = model.towers["vae"].module
    settings = autoencoder.config
    latents = latents.to(autoencoder.dtype)
    # An autoencoder of films takes a frame axis; a picture is a film of one frame.
    film = "frame" in model.check_site("vae.hook_latent").axes
    if scaled == "factor":
        latents = latents / settings.scaling_factor + (getattr(settings, "shift_factor", None) or 0.0)
    elif scaled == "statistics":
        mean, std = (
            torch.tensor(x).to(latents)[:, None, None] for x in (settings.latents_mean, settings.latents_std)
        )
        latents = latents * std + mean
    pictures = autoencoder.decode(latents[:, :, None] if film else latents, return_dict=False, **options)[0]
    return pictures[:, :, 0] if film else pictures
