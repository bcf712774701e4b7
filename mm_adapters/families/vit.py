"""ViT and DeiT as transformers writes them (arXiv 2010.11929, 2012.12877)."""

from mm_adapters.records import (
    Built,
    Input,
    ModelRecord,
    Output,
    Residual,
    Stack,
    Tower,
    TowerMount,
    attention,
    mlp,
    norm,
    register,
)

BLOCKS = Stack(
    ("layers.*",),
    {"hook_resid_pre": Input("")}
    | norm("layernorm_before", "ln1")
    | attention("attention", o="o_proj", heads="config.num_attention_heads")
    | {"hook_attn_out": Output("attention")}
    | {"hook_resid_mid": Residual("hook_resid_pre", "hook_attn_out")}
    | norm("layernorm_after", "ln2")
    | mlp("mlp", up="fc1", down="fc2")
    | {"hook_mlp_out": Output("mlp"), "hook_resid_post": Output("")},
)
register(
    Tower(
        "vit",
        "vision",
        ("transformers:ViTModel", "transformers:DeiTModel"),
        {"blocks": BLOCKS},
        before={"hook_embed": Output("embeddings")},
        after=norm("layernorm", "ln_final") | {"hook_pooled": Output("pooler.activation")},
        absent={"hook_pos_embed": "the position table is added without a module; see W_pos"},
        gives="last_hidden_state",
        position="embeddings.position_embeddings",
        patch="embeddings.patch_embeddings.projection",
        # DeiT's second token is what it was distilled through.
        n_class=Built((("embeddings.distillation_token", True, 2),), 1),
    )
)
for _path in ("vit", "deit"):
    _class = {"vit": "ViT", "deit": "DeiT"}[_path]
    _mount = TowerMount(_path, run="", gives="logits", project="classifier.weight.T")
    register(ModelRecord(f"{_path}_classifier", "tower", (f"transformers:{_class}ForImageClassification",),
                    {"vision": _mount}))  # fmt: skip
