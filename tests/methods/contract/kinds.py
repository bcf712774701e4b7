"""Which tiny families are of which kind: said here, so that no model is built to collect the tests."""

from __future__ import annotations

from typing import Literal, get_args

import mm_adapters as mm

Kind = Literal["contrastive", "vlm", "diffusion", "vision", "text", "language", "denoiser"]

# A test compares this table with the records.
FAMILIES: dict[Kind, str] = {
    "contrastive": """
        clip siglip open_clip open_clip_custom_text metaclip2 altclip chinese_clip siglip2 align clap
        open_clip_average open_clip_resnet open_clip_timm_siglip open_clip_eva open_clip_hf_text coca
    """,
    "vision": """
        clip_vision clip_vision_projected siglip_vision vit deit vit_classifier deit_classifier dinov2
        dinov2_registers dinov3 dinov3_gated beit beit_plain beit_classifier timm_vit timm_vit_average
        timm_eva timm_eva_fused timm_wrapper ijepa ijepa_classifier swin swin_classifier swinv2
        swinv2_classifier resnet resnet_classifier torch_resnet timm_resnet
    """,
    "text": "clip_text clip_text_projected siglip_text bert roberta t5_encoder mclip",
    "language": "llama opt_lm llama_lm",
    "vlm": """
        llava llava_siglip_qwen llava_mistral llava_next llava_onevision qwen2_vl qwen2_5_vl qwen3_vl molmo2
        paligemma gemma3 idefics2 idefics3 smolvlm blip_2 blip_2_t5 instructblip blip blip_vqa blip_itm mllama
        internvl pixtral mistral3 kosmos2 florence2 chameleon janus emu3
    """,
    "denoiser": "unet sd3_transformer flux_transformer sana_transformer unet2d",
    "diffusion": """
        stable_diffusion stable_diffusion_xl stable_diffusion_3 flux qwen_image pixart dit sana unconditional
        deepfloyd_if deepfloyd_if_second_stage kandinsky kandinsky_2_1 kandinsky_3 kandinsky_prior
        kandinsky_combined unclip stable_unclip stable_unclip_image ip_adapter instruct_pix2pix
    """,
}
# Of the pipelines those whose denoiser is trained on latents and what a prompt (or a class) becomes.
TRAINED = """
    stable_diffusion stable_diffusion_xl stable_diffusion_3 flux qwen_image pixart dit unconditional
    deepfloyd_if kandinsky_3
"""
# Of the models with blocks those whose every part adds to one stream behind a norm of its own.
STREAMED = """
    clip siglip open_clip open_clip_custom_text metaclip2 siglip2 open_clip_average open_clip_timm_siglip
    clip_vision clip_vision_projected siglip_vision vit deit vit_classifier deit_classifier dinov2
    dinov2_registers dinov3 dinov3_gated beit beit_plain beit_classifier timm_vit timm_vit_average
    timm_wrapper ijepa ijepa_classifier clip_text clip_text_projected siglip_text t5_encoder llama opt_lm
    llama_lm llava llava_siglip_qwen llava_mistral paligemma blip_2 instructblip kosmos2 janus
"""
_PARTS: dict[str, str] = {**FAMILIES, "trained": TRAINED, "streamed": STREAMED}
KINDS: tuple[Kind, ...] = get_args(Kind)


def kind_of(sites: mm.SiteMap) -> str:
    """A family's kind by its record; of a tower by itself, the tower's role."""
    kind = sites.model_record.kind
    return next(iter(sites.towers.values())).role if kind == "tower" else kind


def families_of(kinds: tuple[Kind | Literal["trained", "streamed"], ...]) -> list[str]:
    """The families of these kinds."""
    return [name for kind in kinds for name in _PARTS[kind].split()]
