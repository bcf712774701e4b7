"""Idefics2: a perceiver reads each image with a few queries (arXiv 2405.02246)."""

from mm_adapters.families._parts import vlm
from mm_adapters.families.idefics3 import LANGUAGE
from mm_adapters.records import (
    Input,
    Output,
    Queries,
    Residual,
    Stack,
    Tower,
    TowerMount,
    attention,
    gated_mlp,
    norm,
    register,
)

PERCEIVER = Stack(
    ("perceiver_resampler.layers.*",),
    {"hook_resid_pre": Input("")}
    | norm("input_latents_norm", "ln1", "RMS")
    | norm("input_context_norm", "ln1_context", "RMS")
    # Its queries attend to the patches and to themselves, in that order.
    | attention("self_attn", o="o_proj", kv_heads="num_key_value_heads")
    | {"hook_attn_out": Output("self_attn")}
    | {"hook_resid_mid": Residual("hook_resid_pre", "hook_attn_out")}
    | norm("post_attention_layernorm", "ln2", "RMS")
    | gated_mlp("mlp")
    | {"hook_mlp_out": Output("mlp"), "hook_resid_post": Output("")},
)

register(
    Tower(
        "idefics2_connector",
        "projector",
        ("transformers:Idefics2Connector",),
        {"blocks": PERCEIVER},
        before={"hook_in": Input("modality_projection"), "hook_projected": Output("modality_projection")},
        after=norm("perceiver_resampler.norm", "ln_final", "RMS") | {"hook_out": Output("")},
        norm="RMS",
        takes="image_hidden_states", gives="", pool="none",
    )
)  # fmt: skip
register(
    vlm("idefics2", "Idefics2ForConditionalGeneration", towers={
        "vision": TowerMount("model.vision_model"),
        "projector": TowerMount("model.connector"),
        "language": LANGUAGE,
    }, images=Queries("perceiver_config.resampler_n_latents"))
)  # fmt: skip
