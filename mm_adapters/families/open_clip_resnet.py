"""CLIP's modified ResNet, as open_clip writes it (arXiv 2103.00020)."""

from mm_adapters.families._conv import maps
from mm_adapters.records import Input, Output, Stack, Tower, fused_attention, register

register(
    Tower(
        "open_clip_resnet",
        "vision",
        ("open_clip:ModifiedResNet",),
        {
            "blocks": Stack(
                ("layer1.*", "layer2.*", "layer3.*", "layer4.*"),
                maps(hook_in="", hook_mid_1="act1", hook_mid_2="act2")
                | {"hook_branch": Output("bn3", is_map=True, in_place=True)}
                | maps(hook_shortcut="downsample", hook_out=""),
            )
        },
        before=maps(hook_embed="avgpool"),
        # The last map's mean and its positions attend to one another; the mean's row is the summary.
        after={"hook_map": Input("attnpool", is_map=True)} | fused_attention("attnpool", name="attn_pool"),
        absent={"blocks.*.attn.*": "only the pooling attends: attn_pool.hook_*"},
        norm=None,
        takes="x",
        gives="",
        pool="attention",
    )
)
