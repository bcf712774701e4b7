"""Kandinsky 2.2's decoder, guided by an image's embedding alone; unCLIP, which draws in four loops."""

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
register(
    Mounts(
        "unclip",
        "diffusion",
        ("diffusers:UnCLIPPipeline",),
        # Its steps are the decoder's; what the others' loops give is joined along the rows.
        {
            "text": Mount("text_encoder"),
            "prior": Mount("prior"),
            "denoiser": Mount("decoder"),
            "super_res": Mount("super_res_first"),
            "super_res_last": Mount("super_res_last"),
        },
        loop="denoiser",
        guidance=Guidance(flag=None, scale="decoder_guidance_scale"),
    )
)
