"""Images and prompts as a diffusion task's examples: latents and text states, encoded once."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from methods_multimodal.data_attribution.diffusion import denoiser_of, takes
from methods_multimodal.diffusion.sampling import sampling_of
from mm_adapters import InputError, Model
from mm_adapters.inputs.images import to_rgb_list


@torch.no_grad()
def diffusion_examples(
    model: Model,
    images: Float[Tensor, "image 3 height width"] | Sequence[Any],
    prompts: Sequence[str] | None = None,
    *,
    batch_size: int = 32,
) -> dict[str, Tensor]:
    """Examples of `diffusion_task`: "latents", and what the prompts become, all on the CPU.

    `images` are pictures or files of one size, or pixels in [0, 1] [image, 3, height, width].
    Pipelines without an autoencoder keep pixels, scaled to [-1, 1].

    Raises: MissingSiteError if the model has no denoiser or reads no text; InputError if prompts are missing,
    not one an image, or not what this pipeline takes.
    """
    pipe, module = model.wrapped, denoiser_of(model)
    pixels = _pixels(images)
    reads_text = hasattr(pipe, "encode_prompt")
    if reads_text != (prompts is not None):
        need = "needs a prompt for each image" if reads_text else "takes no prompts"
        raise InputError(f"{model.name} {need}.")
    if prompts is not None:
        model.check_tower("text")
    if prompts is not None and len(prompts) != len(pixels):
        raise InputError(f"There are {len(pixels)} images and {len(prompts)} prompts.")
    first = next(module.parameters())
    parts: list[dict[str, Tensor]] = []
    for start in range(0, len(pixels), batch_size):
        part = (2 * pixels[start : start + batch_size] - 1).to(first)
        example = {"latents": _latents(model, part)}
        if prompts is not None:
            example |= texts(pipe, module, list(prompts[start : start + batch_size]), part.shape[-2:])
        parts.append({name: value.cpu() for name, value in example.items()})
    return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}


def _pixels(images: Any) -> Tensor:
    if isinstance(images, Tensor):
        if images.ndim != 4 or images.min() < 0 or images.max() > 1:
            raise InputError("Pixels are [image, 3, height, width] in 0 to 1.")
        return images
    pictures = to_rgb_list(images)
    if len({p.size for p in pictures}) > 1:
        raise InputError("The images are of several sizes. Resize them to the one the model was trained at.")
    from torchvision.transforms.functional import to_tensor

    return torch.stack([to_tensor(p) for p in pictures])


def _latents(model: Model, pixels: Tensor) -> Tensor:
    if "vae" not in model.towers:
        return pixels
    vae: Any = model.towers["vae"].module
    encoded = vae.encode(pixels.to(next(vae.parameters())))
    if hasattr(encoded, "latent_dist"):
        latents = encoded.latent_dist.mode()
    else:
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent
    if sampling_of(model, "denoiser")[1].scaled is None:
        return latents
    shift = vae.config.get("shift_factor") or 0.0
    return (latents - shift) * vae.config.get("scaling_factor", 1.0)


def texts(pipe: Any, module: Any, prompts: list[str], size: Sequence[int]) -> dict[str, Tensor]:
    """What `encode_prompt` gives, under the denoiser's names for it."""
    known = inspect.signature(pipe.encode_prompt).parameters
    options = {"device": next(module.parameters()).device, "num_images_per_prompt": 1}
    options |= {"do_classifier_free_guidance": False, "clean_caption": False}
    options |= {name: prompts for name in ("prompt_2", "prompt_3") if name in known}
    encoded = pipe.encode_prompt(prompts, **{k: v for k, v in options.items() if k in known})
    encoded = encoded if isinstance(encoded, tuple) else (encoded,)
    out = {"encoder_hidden_states": encoded[0]}
    pooled = next((v for v in encoded[1:] if v is not None and v.ndim == 2 and v.is_floating_point()), None)
    if takes(module, "pooled_projections") and pooled is not None:
        out["pooled_projections"] = pooled
    elif pooled is not None and module.config.get("addition_embed_type") == "text_time":
        height, width = size
        out["added_cond_kwargs.text_embeds"] = pooled
        out["added_cond_kwargs.time_ids"] = pooled.new_tensor([height, width, 0, 0, height, width]).repeat(
            len(prompts), 1
        )
    elif takes(module, "encoder_attention_mask"):
        masks = [v for v in encoded[1:] if v is not None and v.ndim == 2 and not v.is_floating_point()]
        out |= {"encoder_attention_mask": masks[0]} if masks else {}
    return out
