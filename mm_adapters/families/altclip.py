"""AltCLIP: CLIP's image tower and a multilingual text tower (arXiv 2211.06679)."""

from dataclasses import replace

from mm_adapters.families import _bert, clip
from mm_adapters.records import ModelRecord, Output, Stack, Tower, TowerMount, norm, register

register(replace(clip.VISION, name="altclip_vision", classes=("transformers:AltCLIPVisionModel",)))
register(
    Tower(
        "altclip_text",
        "text",
        ("transformers:AltCLIPTextModel",),
        {"blocks": Stack(("roberta.encoder.layers.*",), _bert.PARTS)},
        before={
            "hook_embed": Output("roberta.embeddings.word_embeddings"),
            "hook_pos_embed": Output("roberta.embeddings.position_embeddings", reference_site="hook_embed"),
            "hook_full_embed": Output("roberta.embeddings"),
        },
        after=norm("pre_LN", "ln_projected") | {"hook_projected": Output("transformation")},
        absent={"ln_final.*": "each block normalises its own result"},
        takes="input_ids",
        embed="roberta.embeddings.word_embeddings.weight",
        position="roberta.embeddings.position_embeddings.weight",
    )
)
register(
    ModelRecord(
        "altclip",
        "contrastive",
        ("transformers:AltCLIPModel",),
        {
            "vision": clip.CLIP.towers["vision"],
            # The summary goes through a map of the tower's own before the joint space's.
            "text": TowerMount(
                "text_model",
                run="get_text_features",
                project="text_model.transformation.weight.T @ text_projection.weight.T",
            ),
        },
        logit_scale="logit_scale",
    )
)
