"""DeepFloyd IF: a cascade in pixels, each stage a pipeline of its own; T5 text, no autoencoder."""

from mm_adapters.records import Guidance, ModelRecord, Sampling, TowerMount, register

register(
    ModelRecord(
        "deepfloyd_if",
        "diffusion",
        ("diffusers:IFPipeline", "diffusers:IFSuperResolutionPipeline", "diffusers:IFImg2ImgPipeline",
         "diffusers:IFInpaintingPipeline"),
        {"text": TowerMount("text_encoder"), "denoiser": TowerMount("unet")},
        loop="denoiser",
        guidance=Guidance(flag=None),
        prompt_length=77,
        sampling={"denoiser": Sampling(variance="always", signed=True)},
    )
)  # fmt: skip
