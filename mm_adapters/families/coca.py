"""CoCa: open_clip's dual towers and a decoder that captions (arXiv 2205.01917)."""

from mm_adapters._registry import register
from mm_adapters._spec import Input, Mount, Mounts, Output, Residual, Stack, Tower
from mm_adapters.families._parts import fused_attention, mlp, norm

_BLOCK = (
    {"hook_resid_pre": Input("")}
    | norm("ln_1", "ln1")
    | fused_attention("attn")
    | {"hook_attn_out": Output("ls_1")}
    | {"hook_resid_mid": Residual("hook_resid_pre", "hook_attn_out")}
    | norm("ln_2", "ln2")
    | mlp("mlp", up="c_fc", down="c_proj")
    | {"hook_mlp_out": Output("ls_2"), "hook_resid_post": Output("")}
)
register(
    Tower(
        "coca_decoder",
        "decoder",
        ("open_clip:MultimodalTransformer",),
        # Each block of words is followed by one that looks at the image.
        {"blocks": Stack(("resblocks.*",), _BLOCK), "cross_blocks": Stack(("cross_attn.*",), _BLOCK)},
        after=norm("ln_final", "ln_final") | {"hook_out": Output("")},
        takes="text_embs",
        gives="",
        pool="each",
        causal=True,
    )
)
register(
    Mounts(
        "coca",
        "contrastive",
        ("open_clip:CoCa",),
        {
            "vision": Mount("visual", run="encode_image", takes="image", project="visual.proj"),
            "text": Mount("text", run="encode_text", takes="text", project="text.text_projection"),
            "decoder": Mount("text_decoder"),
        },
        logit_scale="logit_scale",
    )
)
