"""ChineseCLIP: CLIP's image tower and a BERT (arXiv 2211.01335)."""

from dataclasses import replace

from mm_adapters.families import bert, clip
from mm_adapters.records import ModelRecord, TowerMount, register

register(replace(clip.VISION, name="chinese_clip_vision", classes=("transformers:ChineseCLIPVisionModel",)))
register(replace(bert.BERT, name="chinese_clip_text", classes=("transformers:ChineseCLIPTextModel",)))
register(
    ModelRecord(
        "chinese_clip",
        "contrastive",
        ("transformers:ChineseCLIPModel",),
        {
            "vision": clip.CLIP.towers["vision"],
            "text": TowerMount("text_model", run="get_text_features", gives="pooler_output",
                          project="text_projection.weight.T"),
        },
        logit_scale="logit_scale",
    )
)  # fmt: skip
