"""Stable Diffusion 1, 2 and XL: text encoders, a UNet with cross-attention, an autoencoder
(arXiv 2112.10752, 2307.01952)."""

from mm_adapters.families._unet import MAP_ATTENTION, RESNET, RESNETS
from mm_adapters.records import (
    Guidance,
    Input,
    ModelRecord,
    Output,
    Residual,
    Stack,
    Tower,
    TowerMount,
    attention,
    inside,
    norm,
    register,
)

# An IP-Adapter: a picture's tokens, which each block attends to beside the words (arXiv 2308.06721).
IMAGE_PROMPT = inside("attn2", "heads", "k", "v", "attn_scores", "pattern", "z", name="image_prompt", call=1,
                      needs="attn2.processor.to_k_ip")  # fmt: skip
TRANSFORMER_BLOCK = (
    {"hook_resid_pre": Input("")}
    | norm("norm1", "ln1")
    | attention("attn1", q="to_q", k="to_k", v="to_v", o="to_out.0", heads="heads")
    | {"hook_attn_out": Output("attn1")}
    | {"hook_resid_mid": Residual("hook_resid_pre", "hook_attn_out")}
    | norm("norm2", "ln2")
    | attention("attn2", q="to_q", k="to_k", v="to_v", o="to_out.0", heads="heads", name="cross_attn",
                beside=IMAGE_PROMPT)
    | {"hook_cross_attn_out": Output("attn2")}
    | {"hook_resid_mid_cross": Residual("hook_resid_mid", "hook_cross_attn_out")}
    | norm("norm3", "ln3")
    # GEGLU: one projection makes the linear half, then the gate.
    | {"mlp.hook_pre_linear": Output("ff.net.0.proj", chunk=(2, 0))}
    | {"mlp.hook_pre": Output("ff.net.0.proj", chunk=(2, 1))}
    | {"mlp.hook_post": Input("ff.net.2")}
    | {"hook_mlp_out": Output("ff"), "hook_resid_post": Output("")}
)  # fmt: skip

register(
    Tower(
        "sd_unet",
        "denoiser",
        ("diffusers:UNet2DConditionModel",),
        {
            "resnets": RESNETS,
            "blocks": Stack(("down_blocks.*.attentions.*.transformer_blocks.*",
                             "mid_block.attentions.*.transformer_blocks.*",
                             "up_blocks.*.attentions.*.transformer_blocks.*"), TRANSFORMER_BLOCK),
            "attentions": MAP_ATTENTION,
        },
        before={"hook_in": Input("", is_map=True), "hook_embed": Output("conv_in", is_map=True)},
        after={"hook_mid_block": Output("mid_block", is_map=True), "hook_out": Output("", is_map=True)},
        takes="sample",
        gives="sample",
        pool="none",
    )
)  # fmt: skip
register(
    Tower(
        "autoencoder_kl",
        "vae",
        ("diffusers:AutoencoderKL",),
        {
            "resnets": Stack(("decoder.mid_block.resnets.*", "decoder.up_blocks.*.resnets.*"), RESNET),
        },
        before={"hook_latent": Input("decoder", is_map=True)},
        after={"hook_out": Output("decoder", is_map=True)},
        norm=None,
        takes="sample",
        gives="sample",
        pool="none",
        calls="decoder",  # A pipeline calls its decode, and not it.
    )
)  # fmt: skip
# Perturbed attention, where a pipeline has it: self-attention gives its values (arXiv 2403.17377).
_GUIDANCE = Guidance(rescale="guidance_rescale", perturbed="do_perturbed_attention_guidance")
TOWERS = {
    "text": TowerMount("text_encoder"),
    "vision": TowerMount("image_encoder"),  # With an IP-Adapter.
    "denoiser": TowerMount("unet"),
    "vae": TowerMount("vae"),
}
register(
    ModelRecord(
        "stable_diffusion",
        "diffusion",
        (
            "diffusers:StableDiffusionPipeline",
            "diffusers:StableDiffusionImg2ImgPipeline",
            "diffusers:StableDiffusionInpaintPipeline",
            "diffusers:StableDiffusionControlNetPipeline",
            "diffusers:StableDiffusionControlNetImg2ImgPipeline",
            "diffusers:StableDiffusionControlNetInpaintPipeline",
            "diffusers:StableDiffusionPAGPipeline",
            "diffusers:StableDiffusionPAGImg2ImgPipeline",
            "diffusers:StableDiffusionPAGInpaintPipeline",
            "diffusers:StableDiffusionControlNetPAGPipeline",
            "diffusers:StableDiffusionControlNetPAGInpaintPipeline",
            "diffusers:LatentConsistencyModelPipeline",
            "diffusers:LatentConsistencyModelImg2ImgPipeline",
        ),
        TOWERS,
        loop="denoiser",
        guidance=_GUIDANCE,
    )
)
register(
    ModelRecord(
        "stable_diffusion_xl",
        "diffusion",
        (
            "diffusers:StableDiffusionXLPipeline",
            "diffusers:StableDiffusionXLImg2ImgPipeline",
            "diffusers:StableDiffusionXLInpaintPipeline",
            "diffusers:StableDiffusionXLControlNetPipeline",
            "diffusers:StableDiffusionXLControlNetImg2ImgPipeline",
            "diffusers:StableDiffusionXLControlNetInpaintPipeline",
            "diffusers:StableDiffusionXLPAGPipeline",
            "diffusers:StableDiffusionXLPAGImg2ImgPipeline",
            "diffusers:StableDiffusionXLPAGInpaintPipeline",
            "diffusers:StableDiffusionXLControlNetPAGPipeline",
            "diffusers:StableDiffusionXLControlNetPAGImg2ImgPipeline",
        ),
        {"text": TowerMount("text_encoder"), "text_2": TowerMount("text_encoder_2")} | TOWERS,
        loop="denoiser",
        guidance=_GUIDANCE,
    )
)
