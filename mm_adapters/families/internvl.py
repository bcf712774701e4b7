"""InternVL: an InternViT on the image and its tiles, patches shuffled into fewer (arXiv 2404.16821)."""

from mm_adapters.families._parts import projector, vlm
from mm_adapters.families.llava import TOWERS
from mm_adapters.records import Input, Output, Stack, Stream, Tiles, Tower, attention, mlp, norm, register

BLOCKS = Stack(
    ("encoder.layer.*",),
    {"hook_resid_pre": Input("")}
    | norm("layernorm_before", "ln1")
    | attention("attention", o="projection_layer")
    | {"hook_attn_out": Output("attention", gain="lambda_1"), "hook_resid_mid": Stream("layernorm_after")}
    | norm("layernorm_after", "ln2")
    | mlp("mlp")
    | {"hook_mlp_out": Output("mlp", gain="lambda_2"), "hook_resid_post": Output("")},
)

register(
    Tower(
        "internvl_vision",
        "vision",
        ("transformers:InternVLVisionModel",),
        {"blocks": BLOCKS},
        before={"hook_embed": Output("embeddings")},
        after={"hook_out": Output("layernorm")},
        absent={"ln_final.*": "the projector normalises: projector.ln"},
        gives="last_hidden_state",
        pool="none",
        position="embeddings.position_embeddings",
        patch="embeddings.patch_embeddings.projection",
        n_class=1,
    )
)
register(
    projector(
        "internvl_projector",
        "InternVLMultiModalProjector",
        inside=norm("layer_norm", "ln") | {"hook_pre": Output("linear_1"), "hook_post": Input("linear_2")},
    )
)
register(
    vlm("internvl", "InternVLForConditionalGeneration", towers=TOWERS,
        images=Tiles(count="image_seq_length"))
)  # fmt: skip
