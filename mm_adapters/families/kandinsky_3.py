"""Kandinsky 3: a UNet whose maps attend to T5's words, and to themselves (arXiv 2312.03511)."""

# pyright: reportArgumentType=false

from mm_adapters.families._conv import maps
from mm_adapters.families.kandinsky import MOVQ
from mm_adapters.records import (
    Guidance,
    Input,
    ModelRecord,
    Output,
    Stack,
    Tower,
    TowerMount,
    attention,
    register,
)

_NAMES = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "heads": "heads"}
# A level's first attention is the map's to itself: before the others on the way down, after them up.
_OWN = ("down_blocks.*.attentions.0", "up_blocks.*.attentions.0")
_ONTO_TEXT = ("down_blocks.*.attentions.[1-9]", "up_blocks.*.attentions.[1-9]")
_RESNETS = tuple(
    f"{way}_blocks.{level}.resnets_{side}.{n}"
    for way in ("down", "up") for level in range(8) for n in range(9) for side in ("in", "out")
)  # fmt: skip
_MLP = {
    "mlp.hook_conv_pre": Output("feed_forward.0", is_map=True),
    "mlp.hook_conv_post": Input("feed_forward.2", is_map=True),
    "hook_mlp_map": Output("feed_forward", is_map=True),
    "hook_out": Output("", is_map=True),
}
register(
    Tower(
        "kandinsky3_unet",
        "denoiser",
        ("diffusers:Kandinsky3UNet",),
        {
            "resnets": Stack(_RESNETS, maps(hook_in="", hook_mid="resnet_blocks.1", hook_out="")),
            "blocks": Stack(_ONTO_TEXT, maps(hook_in="") | attention("attention", **_NAMES, name="cross_attn")
                            | {"hook_cross_attn_out": Output("attention")} | _MLP, needs="attention"),
            "attentions": Stack(_OWN, maps(hook_in="") | attention("attention", **_NAMES)
                                | {"hook_attn_out": Output("attention")} | _MLP, needs="attention"),
        },
        before={
            "hook_in": Input("", is_map=True),
            "hook_text_embed": Output("encoder_hid_proj"),
            # The words' mean attends to the words, and joins the time.
            **attention("add_time_condition.attention", **_NAMES, name="text_pool"),
            "hook_embed": Output("conv_in", is_map=True),
        },
        after={"hook_out": Output("", is_map=True)},
        absent={"blocks.*.ln*.*": "its norms are of groups of channels, scaled and shifted by the time"},
        norm=None,
        takes="sample",
        gives="sample",
        pool="none",
    )
)  # fmt: skip
register(
    ModelRecord(
        "kandinsky_3",
        "diffusion",
        ("diffusers:Kandinsky3Pipeline", "diffusers:Kandinsky3Img2ImgPipeline"),
        {"text": TowerMount("text_encoder"), "denoiser": TowerMount("unet"), "vae": TowerMount("movq")},
        loop="denoiser",
        guidance=Guidance(from_zero=True),
        prompt_length=128,
        sampling={"denoiser": MOVQ},
    )
)
