"""ResNet as torchvision and timm write it (arXiv 1512.03385)."""

from mm_adapters.families._conv import NO_ATTENTION, maps
from mm_adapters.records import Input, Output, Stack, Tower, register

register(
    Tower(
        "torch_resnet",
        "vision",
        ("torchvision:ResNet", "timm:ResNet"),
        {
            "blocks": Stack(
                ("layer1.*", "layer2.*", "layer3.*", "layer4.*"),
                maps(hook_in="")
                # After the activation, which works in place and may be one module used twice.
                | {"hook_mid_1": Input("conv2", is_map=True), "hook_mid_2": Input("conv3", is_map=True)}
                | {"hook_branch": Output("bn3|bn2", is_map=True, in_place=True)}
                | maps(hook_shortcut="downsample", hook_out=""),
            )
        },
        before=maps(hook_embed="maxpool"),
        after={"hook_pooled": Input("fc")},
        absent=NO_ATTENTION,
        norm=None,
        takes="x",
        gives="",
        pool="mean",
    )
)
