"""DeepFloyd IF: a cascade in pixels, each stage a pipeline of its own; T5 text, no autoencoder."""

from mm_adapters._registry import register
from mm_adapters._spec import Guidance, Mount, Mounts

register(
    Mounts(
        "deepfloyd_if",
        "diffusion",
        ("diffusers:IFPipeline", "diffusers:IFSuperResolutionPipeline", "diffusers:IFImg2ImgPipeline",
         "diffusers:IFInpaintingPipeline"),
        {"text": Mount("text_encoder"), "denoiser": Mount("unet")},
        loop="denoiser",
        guidance=Guidance(flag=None),
    )
)  # fmt: skip
