"""SigLIP as transformers writes it (arXiv 2303.15343)."""

from mm_adapters.families.clip import BLOCKS
from mm_adapters.records import Input, ModelRecord, Output, Tower, TowerMount, fused_attention, norm, register

# What reads the summary off the patches: one query attends to them, and an MLP follows.
POOL = (
    fused_attention("head.attention", name="pool.attn")
    | {"pool.hook_attn_out": Output("head.attention")}
    | norm("head.layernorm", "pool.ln2")
    | {"pool.mlp.hook_pre": Output("head.mlp.fc1"), "pool.mlp.hook_post": Input("head.mlp.fc2")}
    | {"pool.hook_mlp_out": Output("head.mlp")}
)

VISION = register(
    Tower(
        "siglip_vision",
        "vision",
        ("transformers:SiglipVisionModel",),
        {"blocks": BLOCKS},
        before={"hook_embed": Output("embeddings")},
        after=norm("post_layernorm", "ln_final") | POOL,
        pool="attention",
        position="embeddings.position_embedding.weight",
        patch="embeddings.patch_embedding",
    )
)
TEXT = register(
    Tower(
        "siglip_text",
        "text",
        ("transformers:SiglipTextModel",),
        {"blocks": BLOCKS},
        before={"hook_embed": Output("embeddings.token_embedding"),
                "hook_pos_embed": Output("embeddings.position_embedding", reference_site="hook_embed")},
        after=norm("final_layer_norm", "ln_final"),
        takes="input_ids",
        pool="last",
        embed="embeddings.token_embedding.weight",
        position="embeddings.position_embedding.weight",
    )
)  # fmt: skip
SIGLIP = register(
    ModelRecord(
        "siglip",
        "contrastive",
        ("transformers:SiglipModel",),
        {
            "vision": TowerMount("vision_model", run="get_image_features"),
            "text": TowerMount("text_model", run="get_text_features",
                          project="text_model.head.weight.T"),
        },
        logit_scale="logit_scale",
    )
)  # fmt: skip
register(
    ModelRecord(
        "siglip_text",
        "tower",
        ("transformers:SiglipTextModel",),
        {"text": TowerMount("", tower="siglip_text", run="", takes="input_ids", project="head.weight.T")},
    )
)
