"""open_clip's ViT towers, whose attention is nn.MultiheadAttention (arXiv 2212.07143)."""

from mm_adapters.records import (
    Built,
    Input,
    ModelRecord,
    Output,
    Residual,
    Stack,
    Tower,
    TowerMount,
    fused_attention,
    mlp,
    norm,
    register,
)

BLOCKS = Stack(
    ("transformer.resblocks.*",),
    {"hook_resid_pre": Input("")}
    | norm("ln_1", "ln1")
    | fused_attention("attn")
    | {"hook_attn_out": Output("ls_1")}
    | {"hook_resid_mid": Residual("hook_resid_pre", "hook_attn_out")}
    | norm("ln_2", "ln2")
    | mlp("mlp", up="c_fc", down="c_proj")
    | {"hook_mlp_out": Output("ls_2"), "hook_resid_post": Output("")},
)
TEXT_BEFORE = {"hook_embed": Output("token_embedding")}
TEXT_ABSENT = {"hook_pos_embed": "the position table is added without a module; see W_pos"}

register(
    Tower(
        "open_clip_vision",
        "vision",
        ("open_clip:VisionTransformer",),
        {"blocks": BLOCKS},
        before={"hook_embed": Output("ln_pre")},
        after=norm("ln_post", "ln_final"),
        absent={"pool.*": "the attention that pools is not read by parts"},
        takes="x",
        gives="",
        pool=Built(
            (("attn_pool", True, "attention"), ("pool_type", "avg", "mean"), ("pool_type", "none", "none")),
            "first",
        ),
        position="positional_embedding",
        patch="conv1",
        n_class=1,
    )
)
register(
    Tower(
        "open_clip_text",
        "text",
        ("open_clip:TextTransformer",),
        {"blocks": BLOCKS},
        before=TEXT_BEFORE,
        after=norm("ln_final", "ln_final"),
        absent=TEXT_ABSENT,
        takes="text",
        gives="",
        # An appended class token is read last, whatever else is said.
        pool=Built(
            (("cls_emb", True, "last"), ("pool_type", "first", "first"), ("pool_type", "last", "last")), "end"
        ),
        embed="token_embedding.weight",
        position="positional_embedding",
        causal=True,
    )
)
register(
    ModelRecord(
        "open_clip",
        "contrastive",
        ("open_clip:CLIP",),
        {
            "vision": TowerMount("visual", run="encode_image", takes="image", project="visual.proj"),
            # The text tower's parts are the model's own.
            "text": TowerMount("", tower="open_clip_text", run="encode_text", project="text_projection"),
        },
        logit_scale="logit_scale",
    )
)
register(
    ModelRecord(
        "open_clip_custom_text",
        "contrastive",
        ("open_clip:CustomTextCLIP",),
        {
            "vision": TowerMount(
                "visual", run="encode_image", takes="image", project="visual.proj|visual.head.proj"
            ),
            "text": TowerMount(
                "text", run="encode_text", takes="text", project="text.text_projection|text.proj"
            ),
        },
        logit_scale="logit_scale",
    )
)
