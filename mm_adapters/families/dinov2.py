"""DINOv2, with and without registers, as transformers writes it (arXiv 2304.07193, 2309.16588)."""

from mm_adapters.records import Built, Input, Output, Residual, Stack, Tower, attention, norm, register

# transformers 5.17 has another attention and another gated MLP in it than 5.22.
_ATTENTION = attention("attention", q="q_proj|attention.query", k="k_proj|attention.key",
                       v="v_proj|attention.value", o="o_proj|output.dense",
                       heads="config.num_attention_heads|attention.num_attention_heads")  # fmt: skip
register(
    Tower(
        "dinov2",
        "vision",
        ("transformers:Dinov2Model", "transformers:Dinov2WithRegistersModel"),
        {
            "blocks": Stack(
                ("encoder.layer.*",),
                {"hook_resid_pre": Input("")}
                | norm("norm1", "ln1")
                | _ATTENTION
                | {"hook_attn_out": Output("layer_scale1")}
                | {"hook_resid_mid": Residual("hook_resid_pre", "hook_attn_out")}
                | norm("norm2", "ln2")
                | {"mlp.hook_pre": (Output("mlp.fc1|mlp.gate_proj"), Output("mlp.weights_in", chunk=(2, 0)))}
                | {"mlp.hook_pre_linear": (Output("mlp.up_proj"), Output("mlp.weights_in", chunk=(2, 1)))}
                | {"mlp.hook_post": Input("mlp.fc2|mlp.down_proj|mlp.weights_out")}
                | {"hook_mlp_out": Output("layer_scale2"), "hook_resid_post": Output("")},
            )
        },
        before={"hook_embed": Output("embeddings")},
        after=norm("layernorm", "ln_final"),
        absent={"hook_pos_embed": "the position table is added without a module; see W_pos"},
        position="embeddings.position_embeddings",
        any_size=True,
        patch="embeddings.patch_embeddings.projection",
        n_class=1,
        n_register=Built((("embeddings.register_tokens", True, "config.num_register_tokens"),), 0),
    )
)
