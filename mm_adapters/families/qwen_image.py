"""Qwen-Image: text and image in one joint attention, text first, read by Qwen2.5-VL (arXiv 2508.02324)."""

from mm_adapters._registry import register
from mm_adapters._spec import Guidance, Input, Joint, Mount, Mounts, Output, Stack, Stream, Tower
from mm_adapters.families._dit import JOINT_ATTENTION
from mm_adapters.families._parts import norm

_BLOCK = {
    "hook_resid_pre": Input("", argument="hidden_states"),
    "hook_text_resid_pre": Input("", argument="encoder_hidden_states"),
    **norm("img_norm1", "ln1"),
    **norm("txt_norm1", "text_ln1"),
    **JOINT_ATTENTION,
    "hook_attn_out": Output("attn", item=0),
    "hook_text_attn_out": Output("attn", item=1),
    "hook_resid_mid": Stream("img_norm2", item=1),
    **norm("img_norm2", "ln2"),
    "mlp.hook_pre": Output("img_mlp.net.0.proj"),
    "mlp.hook_post": Input("img_mlp.net.2"),
    "hook_mlp_out": Output("img_mlp"),
    "hook_text_resid_mid": Stream("txt_norm2", item=0),
    **norm("txt_norm2", "text_ln2"),
    "text_mlp.hook_pre": Output("txt_mlp.net.0.proj"),
    "text_mlp.hook_post": Input("txt_mlp.net.2"),
    "hook_text_mlp_out": Output("txt_mlp"),
    "hook_text_resid_post": Output("", item=0),
    "hook_resid_post": Output("", item=1),
}
register(
    Tower(
        "qwen_image_transformer",
        "denoiser",
        ("diffusers:QwenImageTransformer2DModel",),
        {"blocks": Stack(("transformer_blocks.*",), _BLOCK)},
        before={"hook_in": Input(""), "hook_embed": Output("img_in"), "hook_text_embed": Output("txt_in")},
        after={"hook_out": Output("")},
        takes="hidden_states",
        gives="sample",
        pool="none",
        joint=Joint("text"),
    )
)
register(
    Mounts(
        "qwen_image",
        "diffusion",
        ("diffusers:QwenImagePipeline", "diffusers:QwenImageImg2ImgPipeline",
         "diffusers:QwenImageInpaintPipeline"),
        {"text": Mount("text_encoder.model.language_model"),
         "denoiser": Mount("transformer"), "vae": Mount("vae")},
        loop="denoiser",
        # Two calls a step where there is a negative prompt and true_cfg_scale is above one.
        guidance=Guidance(flag=None, scale="true_cfg_scale", denoiser_calls=("cond", "uncond")),
        joint_text=("text",),
        template=("prompt_template_encode", "prompt_template_encode_start_idx"),
    )
)  # fmt: skip
