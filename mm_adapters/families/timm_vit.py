"""timm's VisionTransformer: ViT, DeiT, AugReg, SigLIP's image tower and many more."""

from mm_adapters.records import (
    Built,
    Input,
    ModelRecord,
    Output,
    Residual,
    Stack,
    Tower,
    TowerMount,
    inside,
    mlp,
    norm,
    register,
)

_N = "attn:num_heads"
POOL = Built((("global_pool", "avg", "mean"), ("global_pool", "map", "attention"),
              ("global_pool", "", "none")), "first")  # fmt: skip
register(
    Tower(
        "timm_vit",
        "vision",
        ("timm:VisionTransformer",),
        {
            "blocks": Stack(
                ("blocks.*",),
                {"hook_resid_pre": Input("")}
                | norm("norm1", "ln1")
                | {f"attn.hook_{x}": Output("attn.qkv", _N, chunk=(3, i)) for i, x in enumerate("qkv")}
                | inside("attn", "num_heads", "attn_scores", "pattern")
                | {"attn.hook_z": Input("attn.proj", _N), "hook_attn_out": Output("ls1")}
                | {"hook_resid_mid": Residual("hook_resid_pre", "hook_attn_out")}
                | norm("norm2", "ln2")
                | mlp("mlp", up="fc1", down="fc2")
                | {"hook_mlp_out": Output("ls2"), "hook_resid_post": Output("")},
            )
        },
        before={"hook_embed": Output("norm_pre")},
        after=norm("norm", "ln_final") | norm("fc_norm", "ln_pooled"),
        absent={
            "hook_pos_embed": "the position table is added without a module; see W_pos",
            "ln_final.*": "what was pooled is normalised: ln_pooled",
            "pool.*": "the attention that pools is not read by parts",
        },
        takes="x",
        calls="patch_embed",  # Its wrappers call its methods, and not it.
        gives="",
        pool=POOL,
        position="pos_embed",
        patch="patch_embed.proj",
        n_class=Built((("has_class_token", True, 1),), 0),
        n_register="num_reg_tokens",
    )
)
# By itself it may end in a classifier; what wraps it leaves that out.
register(
    ModelRecord(
        "timm_vit", "tower", ("timm:VisionTransformer",), {"vision": TowerMount("", project="head.weight.T")}
    )
)
