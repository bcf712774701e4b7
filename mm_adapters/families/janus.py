"""Janus: a SigLIP-like tower to see with, VQ codes to draw with (arXiv 2410.13848, 2501.17811)."""

from mm_adapters.families._parts import projector, vlm
from mm_adapters.families.llava import LANGUAGE
from mm_adapters.records import Output, Stack, Tower, TowerMount, attention, mlp, pre_norm, register

BLOCKS = Stack(
    ("encoder.layers.*",),
    pre_norm(ln1="layer_norm1", attn="self_attn", heads=attention("self_attn", o="projection_layer"),
             ln2="layer_norm2", ff="mlp", neurons=mlp("mlp")),
)  # fmt: skip

register(
    Tower(
        "janus_vision",
        "vision",
        ("transformers:JanusVisionModel",),
        {"blocks": BLOCKS},
        before={"hook_embed": Output("embeddings")},
        after={"hook_out": Output("")},
        absent={"ln_final.*": "post_layernorm runs twice, on every position and on the first of its own "
                              "result; hook_out is what it gives"},
        gives="last_hidden_state",
        pool="none",
        position="embeddings.position_embedding.weight",
        patch="embeddings.patch_embedding",
    )
)  # fmt: skip
register(
    projector(
        "janus_aligner",
        "JanusVisionAlignerMLP",
        inside={"hook_pre": Output("fc1")},
        absent={"vq.*": "images are drawn by generate(generation_mode='image') alone"},
    )
)
register(
    vlm("janus", "JanusForConditionalGeneration", towers={
        "vision": TowerMount("model.vision_model"),
        "projector": TowerMount("model.aligner"),
        "language": LANGUAGE,
    })
)  # fmt: skip
