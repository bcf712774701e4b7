"""Kandinsky 2.1, whose decoder reads the text and an image's embedding, and 2.2, which reads the latter."""

from mm_adapters._registry import register
from mm_adapters._spec import Guidance, Mount, Mounts

# A multilingual RoBERTa with a projection around it.
register(Mounts("mclip", "tower", ("diffusers:MultilingualCLIP",), {"text": Mount("transformer", run="")}))
register(
    Mounts(
        "kandinsky_2_1",
        "diffusion",
        ("diffusers:KandinskyPipeline", "diffusers:KandinskyImg2ImgPipeline",
         "diffusers:KandinskyInpaintPipeline"),
        {"text": Mount("text_encoder"), "denoiser": Mount("unet"), "vae": Mount("movq")},
        loop="denoiser",
        guidance=Guidance(flag=None),
    )
)  # fmt: skip
register(
    Mounts(
        "kandinsky",
        "diffusion",
        ("diffusers:KandinskyV22Pipeline", "diffusers:KandinskyV22Img2ImgPipeline",
         "diffusers:KandinskyV22InpaintPipeline", "diffusers:KandinskyV22ControlnetPipeline",
         "diffusers:KandinskyV22ControlnetImg2ImgPipeline"),
        {"denoiser": Mount("unet"), "vae": Mount("movq")},
        loop="denoiser",
        guidance=Guidance(flag=None),
    )
)  # fmt: skip
# Prior and decoder in one call, as AutoPipelineForText2Image makes them.
register(
    Mounts(
        "kandinsky_combined",
        "diffusion",
        ("diffusers:KandinskyV22CombinedPipeline", "diffusers:KandinskyV22Img2ImgCombinedPipeline",
         "diffusers:KandinskyV22InpaintCombinedPipeline"),
        {"text": Mount("prior_text_encoder"), "prior": Mount("prior_prior"), "denoiser": Mount("unet"),
         "vae": Mount("movq")},
        loop="denoiser",
        guidance=Guidance(flag=None),
        more_loops={"prior": Guidance(flag=None, scale="prior_guidance_scale")},
    )
)  # fmt: skip
