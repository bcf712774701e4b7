"""Stable Diffusion 3 and 3.5: text and image in one joint attention, image first (arXiv 2403.03206)."""

from mm_adapters.families._dit import DOUBLE_END, DOUBLE_START
from mm_adapters.records import (
    Guidance,
    Input,
    Joint,
    ModelRecord,
    Output,
    Stack,
    Tower,
    TowerMount,
    attention,
    register,
)

# In 3.5 medium some blocks attend once more, within the image.
_OWN = attention("attn2", q="to_q", k="to_k", v="to_v", o="to_out.0", heads="heads", name="image_attn")
register(
    Tower(
        "sd3_transformer",
        "denoiser",
        ("diffusers:SD3Transformer2DModel",),
        {
            "blocks": Stack(
                ("transformer_blocks.*",),
                {**DOUBLE_START, **_OWN, "hook_image_attn_out": Output("attn2"), **DOUBLE_END},
            )
        },
        before={
            "hook_in": Input("", is_map=True),
            "hook_embed": Output("pos_embed"),
            "hook_text_embed": Output("context_embedder"),
        },
        after={"hook_out": Output("", is_map=True)},
        takes="hidden_states",
        gives="sample",
        pool="none",
        joint=Joint("image"),
    )
)
register(
    ModelRecord(
        "stable_diffusion_3",
        "diffusion",
        (
            "diffusers:StableDiffusion3Pipeline",
            "diffusers:StableDiffusion3Img2ImgPipeline",
            "diffusers:StableDiffusion3InpaintPipeline",
        ),
        {
            "text": TowerMount("text_encoder"),
            "text_2": TowerMount("text_encoder_2"),
            "text_3": TowerMount("text_encoder_3"),
            "denoiser": TowerMount("transformer"),
            "vae": TowerMount("vae"),
        },
        loop="denoiser",
        guidance=Guidance(),
        joint_text=("text", "text_3"),
    )
)
