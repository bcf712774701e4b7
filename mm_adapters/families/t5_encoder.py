"""T5's encoder, the text tower of many pipelines (arXiv 1910.10683)."""

from mm_adapters.records import Input, Output, Residual, Stack, Tower, attention, norm, register

_MLP = "layer.1.DenseReluDense"
register(
    Tower(
        "t5_encoder",
        "text",
        ("transformers:T5EncoderModel", "transformers:UMT5EncoderModel"),
        {
            "blocks": Stack(
                ("encoder.block.*",),
                {"hook_resid_pre": Input("")}
                | norm("layer.0.layer_norm", "ln1", "RMS")
                | attention("layer.0.SelfAttention", q="q", k="k", v="v", o="o", heads="n_heads")
                | {"hook_attn_out": Output("layer.0.SelfAttention")}
                | {"hook_resid_mid": Residual("hook_resid_pre", "hook_attn_out")}
                | norm("layer.1.layer_norm", "ln2", "RMS")
                | {"mlp.hook_pre": Output(f"{_MLP}.wi_0|{_MLP}.wi")}
                | {"mlp.hook_pre_linear": Output(f"{_MLP}.wi_1"), "mlp.hook_post": Input(f"{_MLP}.wo")}
                | {"hook_mlp_out": Output(_MLP), "hook_resid_post": Output("")},
            )
        },
        before={"hook_embed": Output("encoder.embed_tokens")},
        after=norm("encoder.final_layer_norm", "ln_final", "RMS"),
        absent={"hook_pos_embed": "positions enter as a bias on the attention scores"},
        norm="RMS",
        takes="input_ids",
        gives="last_hidden_state",
        pool="each",
        embed="encoder.embed_tokens.weight",
    )
)
