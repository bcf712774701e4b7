"""Idefics3 and SmolVLM: tiles, their patches shuffled into fewer (arXiv 2408.12637, 2504.05299)."""

from mm_adapters.families._parts import language, projector, vlm
from mm_adapters.families.clip import BLOCKS
from mm_adapters.records import Input, Output, Tiles, Tower, TowerMount, norm, register

LANGUAGE = language("model.text_model")

register(
    Tower(
        "idefics_vision",
        "vision",
        tuple(f"transformers:{c}VisionTransformer" for c in ("Idefics2", "Idefics3", "SmolVLM")),
        {"blocks": BLOCKS},
        before={"hook_embed": Output("embeddings")},
        after=norm("post_layernorm", "ln_final"),
        gives="last_hidden_state",
        pool="none",
        position="embeddings.position_embedding.weight",
        patch="embeddings.patch_embedding",
        any_size=True,
    )
)
register(
    projector(
        "idefics3_connector",
        "Idefics3Connector",
        "SmolVLMConnector",
        inside={"hook_shuffled": Input("modality_projection")},
    )
)
register(
    vlm("idefics3", "Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration", towers={
        "vision": TowerMount("model.vision_model"),
        "projector": TowerMount("model.connector"),
        "language": LANGUAGE,
    }, images=Tiles(marker=r"<row_(\d+)_col_(\d+)>"))
)  # fmt: skip
