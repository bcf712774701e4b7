"""Kandinsky 2.2's decoder, guided by an image's embedding alone."""

from mm_adapters._registry import register
from mm_adapters._spec import Guidance, Mount, Mounts

register(
    Mounts(
        "kandinsky",
        "diffusion",
        ("diffusers:KandinskyV22Pipeline", "diffusers:KandinskyV22Img2ImgPipeline"),
        {"denoiser": Mount("unet"), "vae": Mount("movq")},
        loop="denoiser",
        guidance=Guidance(),
    )
)
