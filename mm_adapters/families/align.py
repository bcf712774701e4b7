"""ALIGN: an EfficientNet and a BERT (arXiv 2102.05918)."""

from dataclasses import replace

from mm_adapters.families import bert
from mm_adapters.families._conv import NO_ATTENTION, maps
from mm_adapters.records import ModelRecord, Stack, Tower, TowerMount, register

register(
    Tower(
        "align_vision",
        "vision",
        ("transformers:AlignVisionModel",),
        {
            "blocks": Stack(
                ("encoder.blocks.*",),
                maps(hook_in="", hook_expand="expansion", hook_depthwise="depthwise_conv",
                     hook_squeeze="squeeze_excite", hook_branch="projection.project_bn", hook_out=""),
            )
        },
        before=maps(hook_embed="embeddings"),
        after=maps(hook_pooled="pooler"),
        absent=NO_ATTENTION,
        norm=None,
        pool="mean",
        any_size=True,
    )
)  # fmt: skip
register(replace(bert.BERT, name="align_text", classes=("transformers:AlignTextModel",)))
_TEXT = TowerMount("text_model", run="get_text_features", gives="pooler_output",
              project="text_projection.weight.T")  # fmt: skip
register(
    ModelRecord(
        "align",
        "contrastive",
        ("transformers:AlignModel",),
        {"vision": TowerMount("vision_model", run="get_image_features"), "text": _TEXT},
        # It divides by a temperature; it has no scale to multiply with.
    )
)
