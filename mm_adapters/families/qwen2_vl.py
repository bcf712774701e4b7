"""Qwen2-VL: packed patches, a merger, multi-axis rotary embedding (arXiv 2409.12191)."""

from mm_adapters.families._parts import projector, vlm
from mm_adapters.families.llava import LANGUAGE
from mm_adapters.records import (
    GridFrames,
    Input,
    Merged,
    Output,
    Stack,
    Tower,
    TowerMount,
    mlp,
    norm,
    pre_norm,
    qkv_attention,
    register,
)

BLOCKS = Stack(
    ("blocks.*",),
    pre_norm(ln1="norm1", attn="attn", heads=qkv_attention("attn", rotary=True),
             ln2="norm2", ff="mlp", neurons=mlp("mlp")),
)  # fmt: skip
MERGER = {"hook_pre": Output("mlp.0"), "hook_post": Input("mlp.2")}
PROMPT = "<|vision_start|>{image_token}<|vision_end|>"
TOWERS = {
    "vision": TowerMount("model.visual"),
    "projector": TowerMount("model.visual.merger"),
    "language": LANGUAGE,
}

register(
    Tower(
        "qwen2_vl_vision",
        "vision",
        ("transformers:Qwen2VisionTransformerPretrainedModel",),
        {"blocks": BLOCKS},
        before={"hook_embed": Input("blocks.0")},
        absent={"ln_final.*": "the merger normalises: projector.ln"},
        pool="none",
        packed=True,
        order="cells",
    )
)
register(projector("qwen2_vl_merger", "PatchMerger", inside=norm("ln_q", "ln") | MERGER, packed=True))
register(
    vlm("qwen2_vl", "Qwen2VLForConditionalGeneration", towers=TOWERS,
        images=Merged(merge="vision_config.spatial_merge_size"), videos=GridFrames(), prompt=PROMPT)
)  # fmt: skip
