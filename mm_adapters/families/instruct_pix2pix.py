"""InstructPix2Pix: guided by text and picture, by the picture alone, by neither (arXiv 2211.09800)."""

from mm_adapters.families.stable_diffusion import TOWERS
from mm_adapters.records import Guidance, ModelRecord, register

register(
    ModelRecord(
        "instruct_pix2pix",
        "diffusion",
        ("diffusers:StableDiffusionInstructPix2PixPipeline",),
        TOWERS,
        loop="denoiser",
        guidance=Guidance(denoiser_rows=("cond", "image", "uncond")),
    )
)
