"""CoCa: an open_clip dual tower whose patches a captioning decoder reads (arXiv 2205.01917)."""

from mm_adapters.families.open_clip import BLOCKS
from mm_adapters.records import (
    Input,
    ModelRecord,
    Output,
    Residual,
    Stack,
    Tower,
    TowerMount,
    fused_attention,
    mlp,
    norm,
    register,
)

# A block of its own after each block of the decoder: the words read the image's queries, then an MLP.
CROSS = Stack(
    ("cross_attn.*",),
    {"hook_resid_pre": Input("")}
    | norm("ln_1", "ln1")
    | fused_attention("attn", name="cross_attn")
    | {"hook_cross_attn_out": Output("ls_1")}
    | {"hook_resid_mid": Residual("hook_resid_pre", "hook_cross_attn_out")}
    | norm("ln_2", "ln2")
    | mlp("mlp", up="c_fc", down="c_proj")
    | {"hook_mlp_out": Output("ls_2"), "hook_resid_post": Output("")},
)

register(
    Tower(
        "coca_decoder",
        "language",
        ("open_clip:MultimodalTransformer",),
        {"blocks": Stack(("resblocks.*",), BLOCKS.parts), "cross_blocks": CROSS},
        before={"hook_embed": Input("resblocks.0")},
        after=norm("ln_final", "ln_final"),
        absent={"cross_blocks.*.ln1_kv.*": "the image's norm runs twice, for keys and for values"},
        takes="text_embs",
        gives="",
        pool="each",
        causal=True,
    )
)
register(
    ModelRecord(
        "coca",
        "contrastive",
        ("open_clip:CoCa",),
        {
            "vision": TowerMount(
                "visual", run="encode_image", takes="image", project="visual.proj", unit=True
            ),
            "text": TowerMount(
                "text", run="encode_text", takes="text", project="text.text_projection", unit=True
            ),
            "decoder": TowerMount("text_decoder", project="text_decoder.text_projection"),
        },
        logit_scale="logit_scale",
    )
)
