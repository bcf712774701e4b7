"""DINOv3's vision transformer as transformers writes it (arXiv 2508.10104)."""

from mm_adapters.records import Input, Output, Residual, Stack, Tower, attention, norm, register

register(
    Tower(
        "dinov3",
        "vision",
        ("transformers:DINOv3ViTModel",),
        {
            "blocks": Stack(
                ("model.layer.*",),
                {"hook_resid_pre": Input("")}
                | norm("norm1", "ln1")
                | attention("attention", o="o_proj", heads="config.num_attention_heads", rotary=True)
                | {"hook_attn_out": Output("layer_scale1")}
                | {"hook_resid_mid": Residual("hook_resid_pre", "hook_attn_out")}
                | norm("norm2", "ln2")
                | {"mlp.hook_pre": Output("mlp.gate_proj|mlp.up_proj")}
                | {"mlp.hook_pre_linear": Output("mlp.up_proj", needs="mlp.gate_proj")}
                | {"mlp.hook_post": Input("mlp.down_proj")}
                | {"hook_mlp_out": Output("layer_scale2"), "hook_resid_post": Output("")},
            )
        },
        before={"hook_embed": Output("embeddings")},
        after=norm("norm", "ln_final"),
        patch="embeddings.patch_embeddings",
        any_size=True,
        n_class=1,
        n_register="config.num_register_tokens",
    )
)
