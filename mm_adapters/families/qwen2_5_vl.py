"""Qwen2.5-VL: most blocks of its vision tower attend within windows (arXiv 2502.13923)."""

from mm_adapters.families._parts import projector, vlm
from mm_adapters.families.qwen2_vl import MERGER, PROMPT, TOWERS
from mm_adapters.records import (
    GridFrames,
    Input,
    Merged,
    Stack,
    Tower,
    gated_mlp,
    norm,
    pre_norm,
    qkv_attention,
    register,
)

BLOCKS = Stack(
    ("blocks.*",),
    pre_norm(ln1="norm1", attn="attn", heads=qkv_attention("attn", rotary=True),
             ln2="norm2", ff="mlp", neurons=gated_mlp("mlp"), kind="RMS"),
)  # fmt: skip

register(
    Tower(
        "qwen2_5_vl_vision",
        "vision",
        ("transformers:Qwen2_5_VisionTransformerPretrainedModel",),
        {"blocks": BLOCKS},
        # The patches of a window side by side: the layout says which is where.
        before={"hook_embed": Input("blocks.0")},
        absent={"ln_final.*": "the merger normalises: projector.ln"},
        norm="RMS",
        pool="none",
        packed=True,
        order="windows",
    )
)
register(
    projector(
        "qwen2_5_vl_merger", "Qwen2_5_VLPatchMerger", inside=norm("ln_q", "ln", "RMS") | MERGER, packed=True
    )
)
register(
    vlm("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", towers=TOWERS,
        images=Merged(merge="vision_config.spatial_merge_size"), videos=GridFrames(), prompt=PROMPT)
)  # fmt: skip
