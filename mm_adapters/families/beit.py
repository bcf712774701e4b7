"""BEiT, whose positions are a bias on the attention scores (arXiv 2106.08254)."""

from dataclasses import replace

from mm_adapters.families import vit
from mm_adapters.records import ModelRecord, Output, Stream, Tower, TowerMount, norm, register

# A ViT's block whose branches are scaled before they are added.
_SCALED = {
    "hook_attn_out": Output("attention", gain="lambda_1"),
    "hook_resid_mid": Stream("layernorm_after"),
    "hook_mlp_out": Output("mlp", gain="lambda_2"),
}
register(
    Tower(
        "beit",
        "vision",
        ("transformers:BeitModel",),
        {"blocks": replace(vit.BLOCKS, parts={**vit.BLOCKS.parts, **_SCALED})},
        before={"hook_embed": Output("embeddings")},
        after=norm("layernorm", "ln_final") | norm("pooler.layernorm", "pool.ln"),
        absent={
            "hook_pos_embed": "a bias on the scores, or a table added without a module; see W_pos",
            "ln_final.*": "the mean of the patches is normalised: pool.ln",
        },
        gives="last_hidden_state",
        position="embeddings.position_embeddings",
        any_size=True,
        patch="embeddings.patch_embeddings.projection",
        n_class=1,
    )
)
_MOUNT = TowerMount("beit", run="", gives="logits", project="classifier.weight.T")
register(
    ModelRecord("beit_classifier", "tower", ("transformers:BeitForImageClassification",), {"vision": _MOUNT})
)
