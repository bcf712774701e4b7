"""Kosmos-2: a CLIP tower, queries that read it, a decoder that grounds phrases (arXiv 2306.14824)."""

from mm_adapters.families._parts import projector
from mm_adapters.families.clip import BLOCKS as VISION_BLOCKS
from mm_adapters.records import (
    Input,
    ModelRecord,
    Output,
    Queries,
    Stack,
    Tower,
    TowerMount,
    attention,
    mlp,
    norm,
    pre_norm,
    register,
)

BLOCKS = Stack(
    ("model.layers.*",),
    # z is what the output projection is given: normalised once more.
    pre_norm(ln1="self_attn_layer_norm", attn="self_attn", heads=attention("self_attn"),
             ln2="final_layer_norm", ff="ffn", neurons=mlp("ffn")),
)  # fmt: skip

register(
    Tower(
        "kosmos2_vision",
        "vision",
        ("transformers:Kosmos2VisionTransformer",),
        {"blocks": VISION_BLOCKS},
        before={"hook_full_embed": Output("embeddings"), "hook_embed": Output("pre_layrnorm")},
        absent={"ln_final.*": "post_layernorm runs twice, on the first position and on all"},
        position="embeddings.position_embedding.weight",
        patch="embeddings.patch_embedding",
        n_class=1,
    )
)
register(
    projector(
        "kosmos2_projection",
        "Kosmos2ImageToTextProjection",
        # Its queries attend to the patches and to themselves, in that order.
        inside={"hook_projected": Output("dense")} | attention("x_attn", name="cross_attn"),
    )
)
register(
    Tower(
        "kosmos2_text",
        "language",
        ("transformers:Kosmos2TextForCausalLM",),
        {"blocks": BLOCKS},
        before={"hook_embed": Input("model.layers.0")},
        after=norm("model.layer_norm", "ln_final"),
        takes="input_ids",
        gives="logits",
        pool="each",
        embed="model.embed_tokens.weight",
        causal=True,
    )
)
register(
    ModelRecord(
        "kosmos2",
        "vlm",
        ("transformers:Kosmos2ForConditionalGeneration",),
        {
            "vision": TowerMount("vision_model.model"),
            "projector": TowerMount("image_to_text_projection"),
            "language": TowerMount("text_model", project="text_model.lm_head.weight.T"),
        },
        images=Queries("latent_query_num", mask="image_embeds_position_mask"),
        prompt=None,
    )
)
