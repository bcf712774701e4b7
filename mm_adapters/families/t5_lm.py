"""T5 and Flan-T5 as a language model: an encoder, and a decoder that reads it (arXiv 1910.10683)."""

from functools import partial

from mm_adapters.families._parts import t5_mlp
from mm_adapters.records import Input, Output, Residual, Stack, Tower, attention, norm, register

T5_ATTENTION = partial(attention, q="q", k="k", v="v", o="o", heads="n_heads")


SELF = (
    {"hook_resid_pre": Input("")}
    | norm("layer.0.layer_norm", "ln1", "RMS")
    | T5_ATTENTION("layer.0.SelfAttention")
    | {"hook_attn_out": Output("layer.0.SelfAttention")}
    | {"hook_resid_mid": Residual("hook_resid_pre", "hook_attn_out")}
)
ENCODER = Stack(
    ("encoder.block.*",),
    SELF
    | norm("layer.1.layer_norm", "ln2", "RMS")
    | t5_mlp("layer.1")
    | {"hook_mlp_out": Output("layer.1.DenseReluDense"), "hook_resid_post": Output("")},
)
DECODER = Stack(
    ("decoder.block.*",),
    SELF
    | norm("layer.1.layer_norm", "ln2", "RMS")
    | T5_ATTENTION("layer.1.EncDecAttention", name="cross_attn")
    | {"hook_cross_attn_out": Output("layer.1.EncDecAttention")}
    | {"hook_resid_mid_cross": Residual("hook_resid_mid", "hook_cross_attn_out")}
    | norm("layer.2.layer_norm", "ln3", "RMS")
    | t5_mlp("layer.2")
    | {"hook_mlp_out": Output("layer.2.DenseReluDense"), "hook_resid_post": Output("")},
)

register(
    Tower(
        "t5_lm",
        "language",
        ("transformers:T5ForConditionalGeneration",),
        {"encoder": ENCODER, "decoder": DECODER},
        after=norm("encoder.final_layer_norm", "encoder_ln_final", "RMS")
        | norm("decoder.final_layer_norm", "ln_final", "RMS"),
        absent={"blocks.*": "it has an encoder and a decoder: encoder.* and decoder.*"},
        norm="RMS",
        takes="input_ids",
        gives="logits",
        pool="each",
        embed="shared.weight",
    )
)
