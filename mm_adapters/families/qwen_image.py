"""Qwen-Image: text and image in one joint attention, text first, read by Qwen2.5-VL (arXiv 2508.02324)."""

from mm_adapters.families._dit import double_block
from mm_adapters.records import (
    Guidance,
    Input,
    Joint,
    ModelRecord,
    Output,
    Sampling,
    Stack,
    Tower,
    TowerMount,
    register,
)

_START, _END = double_block("img_norm1", "img_norm2", "img_mlp", text=("txt_norm1", "txt_norm2", "txt_mlp"))
register(
    Tower(
        "qwen_image_transformer",
        "denoiser",
        ("diffusers:QwenImageTransformer2DModel",),
        {"blocks": Stack(("transformer_blocks.*",), {**_START, **_END})},
        before={"hook_in": Input(""), "hook_embed": Output("img_in"), "hook_text_embed": Output("txt_in")},
        after={"hook_out": Output("")},
        takes="hidden_states",
        gives="sample",
        pool="none",
        joint=Joint("text"),
    )
)
register(
    ModelRecord(
        "qwen_image",
        "diffusion",
        ("diffusers:QwenImagePipeline", "diffusers:QwenImageImg2ImgPipeline",
         "diffusers:QwenImageInpaintPipeline"),
        {"text": TowerMount("text_encoder.model.language_model"),
         "denoiser": TowerMount("transformer"), "vae": TowerMount("vae")},
        loop="denoiser",
        # Two calls a step where there is a negative prompt and true_cfg_scale is above one.
        guidance=Guidance(
            flag=None, scale="true_cfg_scale", denoiser_calls=("cond", "uncond"), keeps_norm=True
        ),
        sampling={"denoiser": Sampling(packed=True, scaled="statistics")},
        joint_text=("text",),
        template=("prompt_template_encode", "prompt_template_encode_start_idx"),
    )
)  # fmt: skip
