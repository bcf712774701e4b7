"""Kandinsky 2.1, whose decoder reads the text and an image's embedding, and 2.2, which reads the latter."""

from dataclasses import replace

from mm_adapters.families.prior import PRIOR
from mm_adapters.records import Guidance, ModelRecord, Sampling, TowerMount, register

# Its autoencoder quantizes, unless it is told not to; the loop works on its latents as they are.
MOVQ = Sampling(scaled=None, decode={"force_not_quantize": True}, signed=True)
_SAMPLING = {"denoiser": replace(MOVQ, variance="always")}

# A multilingual RoBERTa with a projection around it.
register(
    ModelRecord(
        "mclip", "tower", ("diffusers:MultilingualCLIP",), {"text": TowerMount("transformer", run="")}
    )
)
register(
    ModelRecord(
        "kandinsky_2_1",
        "diffusion",
        (
            "diffusers:KandinskyPipeline",
            "diffusers:KandinskyImg2ImgPipeline",
            "diffusers:KandinskyInpaintPipeline",
        ),
        {"text": TowerMount("text_encoder"), "denoiser": TowerMount("unet"), "vae": TowerMount("movq")},
        loop="denoiser",
        guidance=Guidance(flag=None),
        sampling=_SAMPLING,
        prompt_length=77,
        outputs=("pil", "np", "pt"),
    )
)
register(
    ModelRecord(
        "kandinsky",
        "diffusion",
        (
            "diffusers:KandinskyV22Pipeline",
            "diffusers:KandinskyV22Img2ImgPipeline",
            "diffusers:KandinskyV22InpaintPipeline",
            "diffusers:KandinskyV22ControlnetPipeline",
            "diffusers:KandinskyV22ControlnetImg2ImgPipeline",
        ),
        {"denoiser": TowerMount("unet"), "vae": TowerMount("movq")},
        loop="denoiser",
        guidance=Guidance(flag=None),
        sampling=_SAMPLING,
    )
)
# Prior and decoder in one call, as AutoPipelineForText2Image makes them.
register(
    ModelRecord(
        "kandinsky_combined",
        "diffusion",
        (
            "diffusers:KandinskyV22CombinedPipeline",
            "diffusers:KandinskyV22Img2ImgCombinedPipeline",
            "diffusers:KandinskyV22InpaintCombinedPipeline",
        ),
        {
            "text": TowerMount("prior_text_encoder"),
            "prior": TowerMount("prior_prior"),
            "denoiser": TowerMount("unet"),
            "vae": TowerMount("movq"),
        },
        loop="denoiser",
        guidance=Guidance(flag=None),
        more_loops={"prior": Guidance(flag=None, scale="prior_guidance_scale")},
        sampling=_SAMPLING | {"prior": PRIOR},
    )
)
