"""BLIP-2 and InstructBLIP: a ViT, a Q-Former, one linear map, a language model (arXiv 2301.12597)."""

from mm_adapters.families._parts import projector, vlm
from mm_adapters.records import (
    Output,
    Queries,
    Stack,
    Tower,
    TowerMount,
    mlp,
    pre_norm,
    qkv_attention,
    register,
)

BLOCKS = Stack(
    ("encoder.layers.*",),
    pre_norm(ln1="layer_norm1", attn="self_attn", heads=qkv_attention("self_attn", o="projection"),
             ln2="layer_norm2", ff="mlp", neurons=mlp("mlp")),
)  # fmt: skip

register(
    Tower(
        "blip_vision",
        "vision",
        tuple(f"transformers:{c}VisionModel" for c in ("Blip", "Blip2", "InstructBlip")),
        {"blocks": BLOCKS},
        before={"hook_embed": Output("embeddings")},
        after={"hook_out": Output("")},
        absent={"ln_final.*": "post_layernorm runs twice, on every position and on the first of its own "
                              "result; hook_out is what it gives"},
        gives="last_hidden_state",
        position="embeddings.position_embedding",
        patch="embeddings.patch_embedding",
        n_class=1,
    )
)  # fmt: skip
register(projector("linear_projector"))
register(
    vlm("blip_2", "Blip2ForConditionalGeneration", "InstructBlipForConditionalGeneration", towers={
        "vision": TowerMount("vision_model"),
        "qformer": TowerMount("qformer"),
        "projector": TowerMount("language_projection", tower="linear_projector"),
        "language": TowerMount("language_model", run="language_model", gives="logits", takes="input_ids",
                          project="language_model.lm_head.weight.T"),
    }, images=Queries("num_query_tokens"), prompt=None)
)  # fmt: skip
