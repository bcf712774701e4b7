"""ResNet as transformers writes it (arXiv 1512.03385)."""

from mm_adapters.families._conv import NO_ATTENTION, maps
from mm_adapters.records import ModelRecord, Output, Stack, Tower, TowerMount, register

register(
    Tower(
        "resnet",
        "vision",
        ("transformers:ResNetModel",),
        {
            "blocks": Stack(
                ("encoder.stages.*.layers.*",),
                maps(hook_in="", hook_mid_1="layer.0")
                | {"hook_mid_2": Output("layer.1", is_map=True, needs="layer.2")}
                | {"hook_branch": Output("layer", is_map=True, in_place=True)}
                | maps(hook_shortcut="shortcut", hook_out=""),
            )
        },
        before=maps(hook_embed="embedder"),
        after=maps(hook_pooled="pooler"),
        absent=NO_ATTENTION,
        norm=None,
        pool="mean",
    )
)
register(
    ModelRecord(
        "resnet_classifier",
        "tower",
        ("transformers:ResNetForImageClassification",),
        {"vision": TowerMount("resnet", run="", gives="logits", project="classifier.1.weight.T")},
    )
)
