"""CLIP as transformers writes it (arXiv 2103.00020)."""

from mm_adapters.records import (
    Input,
    ModelRecord,
    Output,
    Residual,
    Stack,
    Tower,
    TowerMount,
    attention,
    mlp,
    norm,
    register,
)

BLOCKS = Stack(
    ("encoder.layers.*",),
    {"hook_resid_pre": Input("")}
    | norm("layer_norm1", "ln1")
    | attention("self_attn")
    | {"hook_attn_out": Output("self_attn")}
    | {"hook_resid_mid": Residual("hook_resid_pre", "hook_attn_out")}
    | norm("layer_norm2", "ln2")
    | mlp("mlp", up="fc1", down="fc2")
    | {"hook_mlp_out": Output("mlp"), "hook_resid_post": Output("")},
)

VISION = register(
    Tower(
        "clip_vision",
        "vision",
        ("transformers:CLIPVisionModel",),
        {"blocks": BLOCKS},
        before={"hook_full_embed": Output("embeddings"), "hook_embed": Output("pre_layrnorm")},
        after=norm("post_layernorm", "ln_final"),
        position="embeddings.position_embedding.weight",
        patch="embeddings.patch_embedding",
        n_class=1,
    )
)
TEXT = register(
    Tower(
        "clip_text",
        "text",
        ("transformers:CLIPTextModel",),
        {"blocks": BLOCKS},
        before={"hook_embed": Output("embeddings.token_embedding"),
                "hook_pos_embed": Output("embeddings.position_embedding", reference_site="hook_embed")},
        after=norm("final_layer_norm", "ln_final"),
        takes="input_ids",
        pool="end",
        embed="embeddings.token_embedding.weight",
        position="embeddings.position_embedding.weight",
        causal=True,
    )
)  # fmt: skip
CLIP = register(
    ModelRecord(
        "clip",
        "contrastive",
        ("transformers:CLIPModel",),
        {
            "vision": TowerMount("vision_model", run="get_image_features",
                            project="visual_projection.weight.T"),
            "text": TowerMount("text_model", run="get_text_features",
                          project="text_projection.weight.T"),
        },
        logit_scale="logit_scale",
    )
)  # fmt: skip
for _role, _takes in (("vision", "pixel_values"), ("text", "input_ids")):
    register(
        ModelRecord(
            f"clip_{_role}_projected",
            "tower",
            (f"transformers:CLIP{_role.title()}ModelWithProjection",),
            {
                _role: TowerMount(
                    f"{_role}_model",
                    run="",
                    takes=_takes,
                    gives="image_embeds" if _role == "vision" else "text_embeds",
                    project=f"{'visual' if _role == 'vision' else 'text'}_projection.weight.T",
                )
            },
        )
    )
