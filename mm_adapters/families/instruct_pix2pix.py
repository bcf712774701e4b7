"""InstructPix2Pix: guided by text and picture, by the picture alone, by neither (arXiv 2211.09800)."""

from mm_adapters._registry import register
from mm_adapters._spec import Guidance, Mounts
from mm_adapters.families.stable_diffusion import TOWERS

register(
    Mounts(
        "instruct_pix2pix",
        "diffusion",
        ("diffusers:StableDiffusionInstructPix2PixPipeline",),
        TOWERS,
        loop="denoiser",
        guidance=Guidance(denoiser_rows=("cond", "image", "uncond")),
    )
)
