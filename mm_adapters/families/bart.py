"""BART: an encoder, and a decoder that reads it; norms come after the branches (arXiv 1910.13461)."""

from mm_adapters.records import Input, Output, Stack, Tower, attention, norm, register

SELF = (
    {"hook_resid_pre": Input("")}
    | attention("self_attn")
    | {"hook_attn_out": Output("self_attn"), "hook_resid_mid": Input("self_attn_layer_norm")}
    | norm("self_attn_layer_norm", "ln1")
)
CROSS = (
    attention("encoder_attn", name="cross_attn")
    | {"hook_cross_attn_out": Output("encoder_attn")}
    | {"hook_resid_mid_cross": Input("encoder_attn_layer_norm")}
    | norm("encoder_attn_layer_norm", "ln2")
)
MLP = (
    {"mlp.hook_pre": Output("fc1"), "mlp.hook_post": Input("fc2"), "hook_mlp_out": Output("fc2")}
    | {"hook_resid_post": Input("final_layer_norm")}
    | norm("final_layer_norm", "ln3")
    | {"hook_normalized_resid_post": Output("")}
)

for _role, _parts in (("text", SELF | MLP), ("language", SELF | CROSS | MLP)):
    _name = "encoder" if _role == "text" else "decoder"
    register(
        Tower(
            f"bart_{_name}",
            _role,
            (f"transformers:Bart{_name.title()}",),
            {"blocks": Stack(("layers.*",), _parts)},
            before={"hook_embed": Output("layernorm_embedding")},
            absent={"ln_final.*": "each block normalises its own result"},
            takes="input_ids", gives="last_hidden_state", pool="each", causal=_role == "language",
            embed="embed_tokens.weight", position="embed_positions.weight",
        )
    )  # fmt: skip
