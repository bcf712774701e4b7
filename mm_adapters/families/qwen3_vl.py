"""Qwen3-VL: features of several depths join the first language blocks (DeepStack; arXiv 2511.21631)."""

from mm_adapters.families._parts import projector, vlm
from mm_adapters.families.qwen2_vl import PROMPT, TOWERS
from mm_adapters.records import (
    GridFrames,
    Input,
    Merged,
    Output,
    Stack,
    Tower,
    mlp,
    norm,
    pre_norm,
    qkv_attention,
    register,
)

BLOCKS = Stack(
    ("blocks.*",),
    pre_norm(ln1="norm1", attn="attn", heads=qkv_attention("attn", rotary=True),
             ln2="norm2", ff="mlp", neurons=mlp("mlp", up="linear_fc1", down="linear_fc2")),
)  # fmt: skip
MERGER = {"hook_pre": Output("linear_fc1"), "hook_post": Input("linear_fc2")}
DEEPSTACK = {"hook_in": Input("")} | MERGER | {"hook_out": Output("")}

register(
    Tower(
        "qwen3_vl_vision",
        "vision",
        ("transformers:Qwen3VLVisionModel",),
        # What each merger gives is added to the image tokens after a block of the language tower.
        {"blocks": BLOCKS, "deepstack": Stack(("deepstack_merger_list.*",), DEEPSTACK)},
        before={"hook_embed": Input("blocks.0")},
        absent={"ln_final.*": "the merger normalises: projector.ln"},
        pool="none",
        packed=True,
        order="cells",
    )
)
register(
    # It normalises before it joins patches; those of the deepstack do so after.
    projector("qwen3_vl_merger", "Qwen3VLVisionPatchMerger", inside=norm("norm", "ln") | MERGER, packed=True)
)
register(
    vlm("qwen3_vl", "Qwen3VLForConditionalGeneration", towers=TOWERS,
        images=Merged(merge="vision_config.spatial_merge_size"), videos=GridFrames(), prompt=PROMPT)
)  # fmt: skip
