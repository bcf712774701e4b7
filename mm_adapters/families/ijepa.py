"""I-JEPA: a ViT without a class token (arXiv 2301.08243)."""

from mm_adapters.families import vit
from mm_adapters.records import ModelRecord, Output, Tower, TowerMount, norm, register

register(
    Tower(
        "ijepa",
        "vision",
        ("transformers:IJepaModel",),
        {"blocks": vit.BLOCKS},
        before={"hook_embed": Output("embeddings")},
        after=norm("layernorm", "ln_final"),
        absent={"hook_pos_embed": "the position table is added without a module; see W_pos"},
        gives="last_hidden_state",
        pool="mean",
        position="embeddings.position_embeddings",
        patch="embeddings.patch_embeddings.projection",
    )
)
_CLASSES = ("transformers:IJepaForImageClassification",)
_MOUNT = TowerMount("ijepa", run="", gives="logits", project="classifier.weight.T")
register(ModelRecord("ijepa_classifier", "tower", _CLASSES, {"vision": _MOUNT}))
